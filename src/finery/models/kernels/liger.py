"""Liger's Triton kernels for norms and gated MLPs, on GPUs where liger-kernel is installed."""

from typing import Any

from finery.compat import have, need
from finery.log import get_logger
from finery.models.kernels.base import Kernel, Patches
from finery.options import OptionGroup

__all__ = ["Liger"]

log = get_logger(__name__)


class Liger(Kernel):
    """Liger (Hsu et al., 2024, arXiv 2410.10989) patches this one model; its functions for all models of a kind are left alone."""

    switch = "enable_liger_kernel"

    class Options(OptionGroup):
        enable_liger_kernel: bool = False
        """Use liger-kernel for norms and gated MLPs on a GPU where it is installed; elsewhere Finery's own kernels serve."""

    options: Options

    def fits(self, model: Any) -> str:
        """A GPU and the package."""
        if have("liger_kernel") and model.device.type == "cuda":
            return ""
        why = "it needs a GPU" if have("liger_kernel") else "it is not installed (pip install liger-kernel), and needs a GPU"
        log.warning("'enable_liger_kernel': %s; Finery's own kernels serve", why)
        return why

    def apply(self, model: Any, patches: Patches) -> int:
        """What this model's kind has in Liger."""
        before = {id(module): (type(module), dict(module.__dict__)) for module in model.modules()}
        # the head and the positions are served here already, and would be patched for the whole kind
        need("liger_kernel.transformers")._apply_liger_kernel_to_instance(
            model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False
        )
        changed = [module for module in model.modules() if module.__dict__.keys() != before[id(module)][1].keys()]

        def back() -> None:
            for module in changed:
                for name in module.__dict__.keys() - before[id(module)][1].keys():
                    del module.__dict__[name]

        patches.also(back)
        return len(changed)
