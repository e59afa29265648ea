"""LOMO (Lv et al., 2023, arXiv 2306.09782): SGD within the backward pass, so that gradients need no memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finery.training.in_backward import InBackward

if TYPE_CHECKING:
    import torch

__all__ = ["Lomo"]


class Lomo(InBackward):
    """`optim: lomo`: SGD without state, without momentum, and without the gradients of all weights at a time."""

    word = "lomo"

    def rule(self) -> type[torch.optim.Optimizer]:
        """The learning rate times the gradient."""
        from finery.training.lomo import Lomo

        return Lomo
