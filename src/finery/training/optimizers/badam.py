"""BAdam (Luo et al., 2024, arXiv 2404.02827): one block of layers is trained at a time, or a share of each weight matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finery.compat import need
from finery.errors import UserError
from finery.options import Finding, OptionGroup
from finery.training.optimizers.base import ADAMW, Optimizer, Setting, has_many_processes

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Badam"]


class Badam(Optimizer):
    """AdamW of badam on one block after the other: gradients, state and fp32 copies of that block alone."""

    switch = "use_badam"
    package = "badam"
    trains_adapters = False
    keeps_formats = True
    in_turn = "which weights are trained changes on the way"

    class Options(OptionGroup):
        use_badam: bool = False
        """Train all layers, but one block of them at a time (BAdam)."""
        badam_mode: Literal["layer", "ratio"] = "layer"
        """Blocks are layers, or a share of the entries of each weight matrix."""
        badam_start_block: int | None = Field(None, ge=0)
        """The block to begin with, counted from 0; the first or the last where it is not given."""
        badam_switch_mode: Literal["ascending", "descending", "random", "fixed"] = "ascending"
        """The order of the blocks; fixed trains the one that badam_start_block names."""
        badam_switch_interval: int = Field(50, ge=-1)
        """Steps that a block is trained for; -1: it never changes."""
        badam_update_ratio: float = Field(0.05, gt=0, le=1)
        """The share of each matrix that is trained at a time, in ratio mode."""
        badam_mask_mode: Literal["adjacent", "scatter"] = "adjacent"
        """Whether those entries lie side by side or are drawn."""
        badam_verbose: int = Field(0, ge=0, le=2)
        """What is logged when the block changes: nothing, the block (1), or its weights as well (2)."""

    options: Options

    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """Embeddings and head are left as they are, as in the package."""
        need(self.package)
        from finery.training.blocks import layer_blocks, shares

        if setting.name not in ADAMW:
            raise UserError(f"'use_badam' trains with AdamW: leave 'optim' out, found {setting.name!r}")
        given = self.options
        interval = float("inf") if given.badam_switch_interval == -1 else given.badam_switch_interval
        if given.badam_mode == "layer":
            order = {"switch_mode": given.badam_switch_mode, "start_block": given.badam_start_block}
            return layer_blocks(model, setting, {"switch_block_every": interval, "verbose": given.badam_verbose, **order})
        how = {"update_ratio": given.badam_update_ratio, "mask_mode": given.badam_mask_mode, "switch_every": interval}
        return shares(model, setting, how)

    def join(self, accelerator: Any) -> None:
        """torch cannot tell the length of the sparse gradients that a share leaves; the package can."""
        if self.options.badam_mode == "ratio":
            from types import MethodType

            accelerator.clip_grad_norm_ = MethodType(need(self.package).clip_grad_norm_old_version, accelerator)

    def check_more(self, run: Any) -> Iterator[Finding]:
        """What the package has no way for."""
        given = self.options
        if given.badam_switch_interval == 0:
            yield Finding("badam_switch_interval", "should be 1 or more, or -1 to train one block alone, found 0")
        if given.badam_switch_mode == "fixed" and given.badam_start_block is None and given.badam_mode == "layer":
            yield Finding("badam_switch_mode", "is 'fixed', which needs 'badam_start_block'")
        if (optim := run.trainer.get("optim", ADAMW[0])) not in ADAMW:
            yield Finding("use_badam", f"trains with AdamW: leave 'optim' out, found {optim!r}")
        if run.loop.fp16:
            yield Finding("use_badam", "keeps weights in half precision, whose gradients 'fp16' cannot scale: use 'bf16' or 'pure_bf16'")
        if has_many_processes():
            yield Finding("use_badam", "works in one process: the others would not learn which weights are trained")
        if given.badam_mode == "ratio" and run.loop.weight_decay:
            yield Finding("weight_decay", "has no effect with 'badam_mode: ratio'", fatal=False)
