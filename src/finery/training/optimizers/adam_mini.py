"""Adam-mini (Zhang et al., 2024, arXiv 2406.16793): one second moment for a block of weights, not for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finery.compat import need
from finery.errors import UserError
from finery.options import OptionGroup
from finery.training.optimizers.base import Optimizer, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["AdamMini"]


class AdamMini(Optimizer):
    """AdamW of adam-mini with a learning rate for each attention head and each row: half of Adam's state."""

    switch = "use_adam_mini"
    package = "adam_mini"
    trains_adapters = False  # its blocks are heads and neurons, which an adapter's matrices do not have

    class Options(OptionGroup):
        use_adam_mini: bool = False
        """Train with one second moment for each head and row (Adam-mini)."""

    options: Options

    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """Heads as the model's config tells them; the package takes each to be hidden size / heads wide."""
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        hidden, heads = config.hidden_size, config.num_attention_heads
        optimizer = need(self.package).Adam_mini(
            named_parameters=list(model.named_parameters()),
            lr=setting.arguments["lr"],
            betas=setting.arguments["betas"],
            eps=setting.arguments["eps"],
            weight_decay=setting.weight_decay,
            dim=hidden,
            n_heads=heads,
            verbose=False,
        )
        optimizer.head_numel = (getattr(config, "head_dim", None) or hidden // heads) * hidden
        # every process holds whole weights, and their gradients are the same everywhere: nothing is to be summed up
        optimizer.world_size = 1
        for group in optimizer.param_groups:
            in_heads = any(word in group["name"] for word in optimizer.wqk_names)
            for weight in group["params"]:
                if in_heads and "bias" not in group["name"] and weight.numel() % optimizer.head_numel:
                    shape = " x ".join(map(str, weight.shape))
                    raise UserError(f"'use_adam_mini' needs whole attention heads in {group['name']}, which has {shape} weights")
        return optimizer
