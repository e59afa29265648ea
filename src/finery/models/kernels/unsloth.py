"""What `use_unsloth` asks for: fast LoRA on one GPU, which Finery's own kernels give to every model."""

from typing import Any

from finery.log import get_logger
from finery.models.kernels.base import Kernel, Patches
from finery.options import OptionGroup

__all__ = ["Unsloth"]

log = get_logger(__name__)


class Unsloth(Kernel):
    """Unsloth replaces functions of transformers for all models of a process, so it is not loaded; that is said once."""

    switch = "use_unsloth"

    class Options(OptionGroup):
        use_unsloth: bool = False
        """Accepted: Finery's own kernels serve in its place."""
        use_unsloth_gc: bool = False
        """Recompute activations in the backward pass, as gradient_checkpointing does."""

    def fits(self, model: Any) -> str:
        """Never, see above."""
        log.warning("'use_unsloth': Finery's own kernels serve in its place")
        return "Finery's own kernels serve in its place"

    def apply(self, model: Any, patches: Patches) -> int:
        """Nothing to put in place."""
        return 0
