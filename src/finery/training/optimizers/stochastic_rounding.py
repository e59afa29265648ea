"""AdamW on bf16 weights with stochastic rounding: steps below a weight's last digit are made by chance, and are right on average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finery.options import Finding, OptionGroup
from finery.training.optimizers.base import ADAMW, Optimizer, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["StochasticRounding"]


class StochasticRounding(Optimizer):
    """torchao's AdamW, which computes a step in fp32 and rounds it up or down by chance (Zamirai et al., 2020, arXiv 2010.06192)."""

    switch = "stochastic_rounding"
    package = "torchao"

    class Options(OptionGroup):
        stochastic_rounding: bool = False
        """With pure_bf16: round each step of a weight up or down by chance, so that small steps are not lost."""

    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """Groups and settings as the loop's own AdamW."""
        from torchao.optim import _AdamW

        known = {name: value for name, value in setting.arguments.items() if name in ("lr", "betas", "eps")}
        return _AdamW(setting.groups(model), **known, bf16_stochastic_round=True)

    def check_more(self, run: Any) -> Iterator[Finding]:
        """There must be bf16 weights to round, and AdamW to round for."""
        if not run.model.pure_bf16:
            yield Finding("stochastic_rounding", "rounds weights in bf16: set 'pure_bf16: true'; otherwise weights are trained in fp32")
        optim = run.trainer.get("optim")
        if optim not in (None, *ADAMW):
            yield Finding("stochastic_rounding", f"is built for AdamW: leave out 'optim', found {optim!r}")
