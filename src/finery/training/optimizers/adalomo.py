"""AdaLomo (Lv et al., 2023, arXiv 2310.10195): LOMO with steps of adaptive length, whose squares are kept by row and column."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finery.training.in_backward import InBackward

if TYPE_CHECKING:
    import torch

__all__ = ["AdaLomo"]


class AdaLomo(InBackward):
    """`optim: adalomo`: a state of one row and one column for each matrix, and no gradients of all weights at a time."""

    word = "adalomo"

    def rule(self) -> type[torch.optim.Optimizer]:
        """Steps as long as the weight, limited by their own length."""
        from finery.training.lomo import AdaLomo

        return AdaLomo
