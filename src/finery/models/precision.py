"""In which number formats a run computes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finery.compat import processor_flags

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """Formats of frozen and trained weights, and that of mixed-precision products (nothing: none)."""

    frozen: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None
    why: str = ""  # said where the run does not get what it asked for


def choose_precision(bf16: bool | None, fp16: bool, pure_bf16: bool, device: torch.device, frozen_base: bool) -> Precision:
    """What `bf16`, `fp16` and `pure_bf16` mean on this device; without any of them, bf16 is taken where the device computes it.

    `frozen_base` says that the base's weights are not trained (LoRA): they may then be held in half precision,
    while trained weights stay fp32 unless `pure_bf16`.
    """
    import torch

    if pure_bf16:
        slow = device.type == "cpu" and not cpu_computes_bf16()
        return Precision(torch.bfloat16, torch.bfloat16, None, "this CPU has no bf16 instructions: pure_bf16 will be slow" if slow else "")
    unasked = bf16 is None and not fp16
    asked = torch.bfloat16 if bf16 or unasked else torch.float16 if fp16 else None
    why = _refusal(asked, device)
    if asked is None or why:
        return Precision(torch.float32, torch.float32, None, "" if unasked else why)
    return Precision(asked if frozen_base else torch.float32, torch.float32, asked)


def _refusal(asked: torch.dtype | None, device: torch.device) -> str:
    import torch

    if asked is None:
        return ""
    if asked == torch.float16 and device.type != "cuda":
        return f"fp16 needs a GPU, this run is on {device.type}: training in fp32"
    if device.type == "cpu" and not cpu_computes_bf16():
        return "this CPU has no bf16 instructions: training in fp32"
    if device.type == "cuda" and asked == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU has no bf16: training in fp32"
    return ""


def cpu_computes_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-bf16, AMX or the ARM extension); false where it is not known."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(processor_flags(cpuinfo).split()))


def named_dtype(asked: str, own: torch.dtype) -> torch.dtype:
    """The number format that `infer_dtype` names; `auto` is the model's own."""
    import torch

    return own if asked == "auto" else getattr(torch, asked)


def inference_dtype(asked: str, own: torch.dtype, device: torch.device) -> torch.dtype:
    """The number format to answer in: `infer_dtype`, or for `auto` the model's own where the device computes it."""
    import torch

    if asked != "auto":
        return named_dtype(asked, own)
    if device.type == "cpu" and (own == torch.float16 or (own == torch.bfloat16 and not cpu_computes_bf16())):
        return torch.float32
    return own
