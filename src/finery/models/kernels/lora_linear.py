"""Linear layers with LoRA as one operation; layers that read the same input share its thin products."""

from typing import Any

from finery.models.kernels.base import Kernel, Patches
from finery.options import OptionGroup

__all__ = ["LoraLinear"]


class LoraLinear(Kernel):
    """Serves plain LoRA on plain linear layers, rank-stabilised or with dropout as well; the rest is left to peft."""

    switch = "lora_linear"

    class Options(OptionGroup):
        lora_linear: bool = True
        """Compute linear layers and their adapters as one operation."""

    def fits(self, model: Any) -> str:
        """CPUs: on a GPU, where small operations cost their launch, peft's own were a tenth faster (docs/speed.md)."""
        if model.device.type != "cpu":
            return "on a GPU peft's own operations are faster"
        from finery.models.kernels.functions.lora_linear import serves

        return "" if any(map(serves, model.modules())) else "there is no plain LoRA layer"

    def apply(self, model: Any, patches: Patches) -> int:
        """Siblings that read the same input become a group."""
        from finery.models.kernels.functions.lora_linear import groups, serves

        found = groups([dict(parent.named_children()) for parent in model.modules()], serves)
        return patches.forwards(pair for group in found for pair in group.forwards())
