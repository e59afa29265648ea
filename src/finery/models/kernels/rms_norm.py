"""RMSNorm in one pass forward and one backward, saving its input and one number a row."""

from typing import Any

from finery.models.kernels.base import Kernel, Patches, cpu_only
from finery.options import OptionGroup

__all__ = ["RmsNorm"]


class RmsNorm(Kernel):
    """Serves every module that turns out to compute this, whatever its class is called."""

    switch = "rms_norm"

    class Options(OptionGroup):
        rms_norm: bool = True
        """Normalise in one pass over memory (CPU)."""

    def fits(self, model: Any) -> str:
        """On CPUs with a compiler."""
        return cpu_only(model)

    def apply(self, model: Any, patches: Patches) -> int:
        """Every such module is tried on random rows first."""
        from finery.models.kernels.functions.rms_norm import candidates

        return patches.forwards(candidates(model))
