"""The product of a gated MLP, activation included, in one pass forward and one backward."""

from typing import Any

from finery.models.kernels.base import Kernel, Patches, cpu_only
from finery.options import OptionGroup

__all__ = ["GatedMlp"]


class GatedMlp(Kernel):
    """Serves MLPs of gate_proj, up_proj and down_proj with SiLU or GELU's tanh form."""

    switch = "gated_mlp"

    class Options(OptionGroup):
        gated_mlp: bool = True
        """Compute SwiGLU and its like in one pass over memory (CPU)."""

    def fits(self, model: Any) -> str:
        """On CPUs with a compiler."""
        return cpu_only(model)

    def apply(self, model: Any, patches: Patches) -> int:
        """Every such module is tried on random rows first."""
        from finery.models.kernels.functions.gated_mlp import candidates

        return patches.forwards(candidates(model))
