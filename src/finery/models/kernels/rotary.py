"""Rotary positions in one pass over queries and keys, nothing saved but the angles."""

from typing import Any

from finery.models.kernels.base import Kernel, Patches, cpu_only
from finery.options import OptionGroup

__all__ = ["Rotary"]


class Rotary(Kernel):
    """Serves attention modules whose forward calls transformers' usual function, if that computes the same."""

    switch = "rotary"

    class Options(OptionGroup):
        rotary: bool = True
        """Turn queries and keys by their positions in one pass over memory (CPU)."""

    def fits(self, model: Any) -> str:
        """On CPUs with a compiler."""
        return cpu_only(model)

    def apply(self, model: Any, patches: Patches) -> int:
        """The module's own forward runs on, with one name standing for this: all other instances keep theirs."""
        from finery.models.kernels.functions.rotary import candidates

        return patches.forwards(candidates(model))
