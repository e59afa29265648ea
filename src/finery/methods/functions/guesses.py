"""Which supervised tokens a model finds likeliest, counted on the way of a loss."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from finery.models.head import TokenLoss, gathered, summed

_GUESSED: ContextVar[list[Tensor] | None] = ContextVar("guessed", default=None)
"""Where the losses of this thread put what was guessed right, while somebody counts."""


def guessed() -> AbstractContextManager[list[Tensor]]:
    """For each supervised token of the losses that this thread evaluates meanwhile, in order: whether it is the likeliest."""
    return gathered(_GUESSED)


def counting() -> TokenLoss | None:
    """Plain cross entropy that counts; nothing where nobody counts."""
    hits = _GUESSED.get()
    return None if hits is None else partial(_counted, hits)


def _counted(hits: list[Tensor], scores_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
    hits.append(scores_CV.argmax(-1) == target_C)
    return summed(F.cross_entropy(scores_CV, target_C, reduction="none"))
