"""Trained linear layers in mixed precision: weights are rounded to half precision once a step, for all micro-batches and threads."""

from typing import Any

from finery.models.kernels.base import Kernel, Patches
from finery.options import OptionGroup

__all__ = ["MixedLinear"]


class MixedLinear(Kernel):
    """Serves linear layers whose fp32 weights are trained, where autocast computes their products; elsewhere they stay as they are."""

    switch = "mixed_linear"

    class Options(OptionGroup):
        mixed_linear: bool = True
        """Round trained weights to bf16 once a step instead of once a micro-batch (CPU)."""

    def fits(self, model: Any) -> str:
        """CPUs; autocast keeps a copy for each micro-batch and thread otherwise."""
        if model.device.type != "cpu":
            return "it is built for CPUs"
        from finery.models.kernels.functions.mixed_linear import candidates

        return "" if any(True for _ in candidates(model)) else "no linear layer with fp32 weights is trained"

    def apply(self, model: Any, patches: Patches) -> int:
        """Every such layer but the output head, which `head_loss` serves."""
        from finery.models.kernels.functions.mixed_linear import candidates

        return patches.forwards(candidates(model))
