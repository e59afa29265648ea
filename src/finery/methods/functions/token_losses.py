"""What a token may cost, beside plain cross entropy: sums over tokens, from fp32 scores.

Each weight on a token's cross entropy is a number, not a path for gradients. Shapes: C tokens, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from finery.models.head import TokenLoss, summed

NUM_LIKELIEST = 20
"""Of so many tokens EAFT takes the entropy."""
MOST_ENTROPY = 3.0
"""What EAFT divides that by: about ln 20, the most that it can be."""


def dft(scores_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None = None) -> Tensor:
    """-p·log p of each token (Wu et al., 2025, arXiv 2508.05629, equation 9): what the model finds unlikely moves it less."""
    return summed(_dft(scores_CV, target_C))


def _dft(scores_CV: Tensor, target_C: Tensor) -> Tensor:
    costs_C = F.cross_entropy(scores_CV, target_C, reduction="none")
    return torch.exp(-costs_C.detach()) * costs_C


def eaft(alpha: float) -> TokenLoss:
    """-(H / 3)^alpha · log p, H the entropy of the 20 likeliest tokens among themselves (Diao et al., 2026, arXiv 2601.02151)."""
    return partial(_eaft, alpha)


def _eaft(alpha: float, scores_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
    likeliest = scores_CV.detach().topk(min(NUM_LIKELIEST, scores_CV.shape[1]), -1).values
    logps = torch.log_softmax(likeliest, -1)
    entropy_C = -(logps.exp() * logps).sum(-1)
    return summed((entropy_C / MOST_ENTROPY) ** alpha * F.cross_entropy(scores_CV, target_C, reduction="none"))


def asft(alpha: float) -> TokenLoss:
    """DFT, and alpha · KL(reference ‖ model) that holds it to the model it was (Zhu et al., 2025, arXiv 2509.23753)."""
    return partial(_asft, alpha)


def _asft(alpha: float, scores_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
    assert reference_CV is not None
    logps_CV, wanted_CV = torch.log_softmax(scores_CV, -1), torch.log_softmax(reference_CV, -1)
    apart_C = F.kl_div(logps_CV, wanted_CV, reduction="none", log_target=True).sum(-1)
    return summed(_dft(scores_CV, target_C) + alpha * apart_C)


def smoothed(epsilon: float) -> TokenLoss:
    """(1 - epsilon) · -log p + epsilon · the mean of -log p over the vocabulary (Szegedy et al., 2015, arXiv 1512.00567)."""
    return partial(_smoothed, epsilon)


def _smoothed(epsilon: float, scores_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
    return summed(F.cross_entropy(scores_CV, target_C, reduction="none", label_smoothing=epsilon))
