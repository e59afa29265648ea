"""Muon (Jordan et al., 2024; Liu et al., 2025, arXiv 2502.16982): the step of a matrix is made orthogonal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finery.options import OptionGroup
from finery.training.optimizers.base import Optimizer, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Muon"]

PLAIN = ("embed", "lm_head")
"""Matrices with this in their name are tables, of which each row stands for itself: they are stepped by AdamW."""


class Muon(Optimizer):
    """torch's Muon for matrices, with steps as long as AdamW's, and AdamW for embeddings, head, norms and biases."""

    switch = "use_muon"

    class Options(OptionGroup):
        use_muon: bool = False
        """Train matrices with orthogonal steps (Muon), the rest with AdamW; both with the run's learning rate and weight decay."""

    options: Options

    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """Two optimizers as one."""
        import torch

        from finery.training.joined import Joined

        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        matrices = {name for name, weight in trained if weight.ndim == 2 and not any(word in name for word in PLAIN)}
        lr, decay = setting.arguments["lr"], setting.weight_decay
        shared = {name: setting.arguments[name] for name in ("lr", "betas", "eps")}
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            weights = [weight for name, weight in trained if name in matrices]
            # steps of AdamW's length: one learning rate then serves both
            parts.append(torch.optim.Muon(weights, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        rest = [
            {"params": [weight for name, weight in trained if name not in matrices and (name in setting.decayed) is decays]}
            | {"weight_decay": decay if decays else 0.0}
            for decays in (True, False)
        ]
        if any(group["params"] for group in rest):
            parts.append(torch.optim.AdamW(rest, **shared))
        return Joined(parts)
