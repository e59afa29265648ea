"""Products in 8-bit floating point (Micikevicius et al., 2022, arXiv 2209.05433), by accelerate's recipes, where a GPU can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from finery.compat import have
from finery.errors import UserError
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    import torch
    from torch import nn

ABLE = (8, 9)
"""The compute capability of the first GPUs that can (Ada; Hopper has 9.0)."""
PACKAGES = {"torchao": "torchao", "te": "transformer_engine", "msamp": "msamp"}
"""By the word of `fp8_backend`, in the order in which they are looked for."""
INSTALL = {"torchao": "pip install torchao", "te": "pip install transformer-engine[pytorch]", "msamp": "see github.com/Azure/MS-AMP"}
AROUND = ("lora_linear", "mixed_linear")
"""Kernels that compute the products of linear layers by themselves, and would go around the recipe."""
ROUND = 16
"""Both sizes of a product must be a multiple of it."""


class Fp8Options(OptionGroup):
    fp8: bool = False
    """Compute the products of linear layers in 8-bit floating point, on a GPU that can (Ada, Hopper or newer); the rest as with bf16."""
    fp8_backend: Literal["auto", "torchao", "te", "msamp"] = "auto"
    """What computes them: torchao, Transformer Engine (te), MS-AMP (msamp), or the first of these that is installed."""
    fp8_enable_fsdp_float8_all_gather: bool = False
    """Let FSDP send weights between GPUs in 8 bits as well (torchao)."""

    def check(self, run: Any) -> Iterator[Finding]:
        """One format at a time; the other keys belong to `fp8`."""
        if self.fp8 and run.quantization.quantization_bit:
            yield Finding("fp8", "and 'quantization_bit' exclude each other: keep one")
        if self.fp8 and run.loop.fp16:
            yield Finding("fp8", "and 'fp16' exclude each other: keep one")
        for key in ("fp8_backend", "fp8_enable_fsdp_float8_all_gather"):
            if key in run.written and not self.fp8:
                yield Finding(key, "has no effect without 'fp8'", fatal=False)


def check_device(options: Fp8Options, device: torch.device) -> None:
    """Raises `UserError` where `fp8` is asked for and this device does not compute it."""
    if not options.fp8:
        return
    import torch

    wanted = f"a GPU with compute capability {ABLE[0]}.{ABLE[1]} or more (Ada, Hopper or newer)"
    if device.type != "cuda":
        raise UserError(f"'fp8' needs {wanted}; this run is on {device.type}: leave it out, or set 'bf16: true'")
    found = torch.cuda.get_device_capability(device)
    if found < ABLE:
        raise UserError(f"'fp8' needs {wanted}; this one has {found[0]}.{found[1]}: leave it out, or set 'bf16: true'")


def recipe(options: Fp8Options) -> Any:
    """What accelerate is handed; raises `UserError` for a package that is not there."""
    from accelerate.utils import AORecipeKwargs, MSAMPRecipeKwargs, TERecipeKwargs

    name = _chosen(options.fp8_backend)
    if name == "torchao":
        gathers = options.fp8_enable_fsdp_float8_all_gather
        return AORecipeKwargs(enable_fsdp_float8_all_gather=gathers, module_filter_func=is_served)
    if name == "te":
        return TERecipeKwargs(fp8_format="HYBRID")
    return MSAMPRecipeKwargs(opt_level="O2")


def _chosen(asked: str) -> str:
    if asked == "auto":
        asked = next((name for name, package in PACKAGES.items() if have(package)), "torchao")
    if not have(PACKAGES[asked]):
        raise UserError(f"'fp8_backend: {asked}' needs a package that is not installed: {INSTALL[asked]}")
    return asked


def is_served(layer: nn.Module, name: str) -> bool:
    """Whether a layer's products are computed in 8 bits: large ones inside the stack; thin matrices and the head would lose too much."""
    from torch import nn

    large = isinstance(layer, nn.Linear) and not layer.in_features % ROUND and not layer.out_features % ROUND
    return large and ".lora_" not in name and not name.endswith(("lm_head", "embed_out", "output"))


def without_others(kernels: Mapping[str, OptionGroup], options: Fp8Options) -> Mapping[str, OptionGroup]:
    """The kernels, those that would go around the recipe switched off."""
    if not options.fp8:
        return kernels
    return {name: given.model_copy(update={name: False}) if name in AROUND else given for name, given in kernels.items()}
