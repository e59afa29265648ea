"""Attention over rows that lie end to end: each sees itself alone, no mask of all with all is made."""

from collections.abc import Iterator
from typing import Any, Literal

from finery.compat import have
from finery.models.kernels.base import Kernel, Patches
from finery.options import Finding, OptionGroup

__all__ = ["PackedAttention"]

PACKAGES = {"fa2": "flash_attn", "fa3": "flash_attn_interface"}
"""The package that an implementation of transformers' needs."""
NAMES = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "flex": "flex_attention", "sdpa": "finery_sdpa", "own": "finery"}
"""How transformers' registry of attention functions calls what `flash_attn` names."""


class PackedAttention(Kernel):
    """Registered with transformers under a name of its own, for the layers of one model."""

    switch = "packed_attention"

    class Options(OptionGroup):
        packed_attention: bool = True
        """Lay the rows of a micro-batch end to end instead of padding them; a trial on the model's first layers must give the same."""
        flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3", "flex"] = "auto"
        """Who computes attention: auto takes Finery's own on CPUs and the fastest that is there on GPUs, disabled the model's plain one,
        with rows padded."""

    options: Options

    def check(self, run: Any) -> Iterator[Finding]:
        """An implementation that is named must be there."""
        asked = self.options.flash_attn
        if asked in PACKAGES and not have(PACKAGES[asked]):
            yield Finding("flash_attn", f"is {asked!r}, which needs a GPU and the package {PACKAGES[asked]}; 'auto' takes what is there")

    def fits(self, model: Any) -> str:
        """Every model that takes its attention from transformers' registry."""
        if self.options.flash_attn == "disabled":
            return "'flash_attn' is disabled"
        if self.options.flash_attn == "flex" and model.device.type != "cuda":
            return "flex attention learns on GPUs only"
        return "" if model._can_set_attn_implementation() else "the model's attention is its own, not taken from transformers' registry"

    def apply(self, model: Any, patches: Patches) -> int:
        """Set it for this model; one without a mask function of its own gets no mask at all from transformers."""
        from transformers import AttentionInterface

        from finery.models.kernels.functions.packed_attention import attend, attend_by_sdpa

        AttentionInterface.register(NAMES["own"], attend)
        AttentionInterface.register(NAMES["sdpa"], attend_by_sdpa)
        config, text = model.config, model.config.get_text_config()
        inner = next((key for key in config.sub_configs if getattr(config, key) is text), None)
        before = (config._attn_implementation, text._attn_implementation)

        def put(outer: str, own: str) -> None:
            # towers see rows of their own, in both directions
            model.set_attn_implementation({"": outer, inner: own} if inner else outer)

        put(*[NAMES[self._chosen(model)]] * 2)
        patches.also(lambda: put(*before))
        return int(text.num_hidden_layers)

    def _chosen(self, model: Any) -> str:
        if self.options.flash_attn != "auto":
            return self.options.flash_attn
        has_flash = model.device.type == "cuda" and have(PACKAGES["fa2"]) and next(model.parameters()).dtype.itemsize == 2
        return "fa2" if has_flash else "own"
