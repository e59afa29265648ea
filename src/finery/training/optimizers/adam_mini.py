"""Adam-mini (Zhang et al., 2024, arXiv 2406.16793): one second moment for a block of weights, not for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finery.compat import need
from finery.errors import UserError
from finery.options import OptionGroup
from finery.training.optimizers.base import Optimizer, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["AdamMini"]

WORDS = ("embd_names", "output_names", "wqk_names", "wv_names", "attn_proj_names", "mlp_names")
"""Where the package keeps the words by which it tells from a weight's name what its blocks are."""
NAMED, ROWS, WHOLE = -1, -2, -3
"""Blocks as the name tells, one for each row, or the weight as one; a number above 0: so many weights each, which are a head's."""


class AdamMini(Optimizer):
    """AdamW of adam-mini with a learning rate for each attention head and each row: half of Adam's state."""

    switch = "use_adam_mini"
    package = "adam_mini"

    class Options(OptionGroup):
        use_adam_mini: bool = False
        """Train with one second moment for each head and row (Adam-mini)."""

    options: Options

    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """Heads as the model's config tells them; the package takes each to be hidden size / heads wide.

        By their names it would take an adapter's matrices to be whole weights, whose heads they do not hold. So these are told apart
        here: heads are blocks of rows of a query's or key's second matrix, and all other matrices have a block for each row.
        """
        from finery.training.joined import Joined

        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        is_adapter = hasattr(model, "peft_config")
        kinds: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                kind = _blocks(name, weight, width) if is_adapter and "modules_to_save" not in name else NAMED
                kinds.setdefault(kind, []).append((name, weight))
        parts = [self._part(config, setting, weights, kind, width) for kind, weights in kinds.items()]
        return parts[0] if len(parts) == 1 else Joined(parts)

    def _part(self, config: Any, setting: Setting, weights: list[tuple[str, nn.Parameter]], kind: int, width: int) -> Any:
        optimizer = need(self.package).Adam_mini(
            named_parameters=weights,
            lr=setting.arguments["lr"],
            betas=setting.arguments["betas"],
            eps=setting.arguments["eps"],
            weight_decay=setting.weight_decay,
            dim=config.hidden_size,
            n_heads=config.num_attention_heads,
            verbose=False,
        )
        # every process holds whole weights, and their gradients are the same everywhere: nothing is to be summed up
        optimizer.world_size = 1
        optimizer.head_numel = kind if kind > 0 else width * config.hidden_size
        if kind in (ROWS, WHOLE):
            vars(optimizer).update({words: set() for words in WORDS})
            optimizer.mlp_names = {""} if kind == ROWS else set()  # each name holds nothing
        for group in optimizer.param_groups:
            in_heads = any(word in group["name"] for word in optimizer.wqk_names)
            for weight in group["params"]:
                if in_heads and "bias" not in group["name"] and weight.numel() % optimizer.head_numel:
                    shape = " x ".join(map(str, weight.shape))
                    raise UserError(f"'use_adam_mini' needs whole attention heads in {group['name']}, which has {shape} weights")
        return optimizer


def _blocks(name: str, weight: nn.Parameter, width: int) -> int:
    """The blocks of an adapter's weight; of a query's or key's B, each head is `width` rows."""
    if weight.ndim != 2:
        return WHOLE
    in_heads = ".lora_B." in name and any(word in name for word in ("q_proj", "k_proj", "query", "key", "wq", "wk"))
    return width * weight.shape[1] if in_heads and weight.shape[0] % width == 0 else ROWS
