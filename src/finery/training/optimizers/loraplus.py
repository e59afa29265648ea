"""LoRA+ (Hayou et al., 2024, arXiv 2402.12354): the second matrix of an adapter learns faster than the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finery.options import Finding, OptionGroup
from finery.training.optimizers.base import Optimizer, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["LoraPlus"]


class LoraPlus(Optimizer):
    """The optimizer that `optim` names, with an own learning rate for each of an adapter's two matrices."""

    switch = "loraplus_lr_ratio"

    class Options(OptionGroup):
        loraplus_lr_ratio: float | None = Field(None, gt=0)
        """Switches LoRA+ on: B's learning rate is so many times A's."""
        loraplus_lr_embedding: float = Field(1e-6, gt=0)
        """Learning rate of adapters on embeddings under LoRA+."""

    options: Options

    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """Groups as in the paper's code, and peft's."""
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(
            model,  # type: ignore[arg-type]
            setting.kind,
            loraplus_lr_ratio=float(self.options.loraplus_lr_ratio or 1.0),
            loraplus_lr_embedding=self.options.loraplus_lr_embedding,
            loraplus_weight_decay=setting.weight_decay,
            **setting.arguments,
        )

    def check_more(self, run: Any) -> Iterator[Finding]:
        """Two matrices are needed."""
        if not run.adapter.has_two_matrices:
            yield Finding("loraplus_lr_ratio", f"needs 'finetuning_type: lora', found {run.choices.finetuning_type!r}")
