"""torchao's weight-only formats: 8 bits everywhere, 4 bits where its kernels are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finery.compat import have
from finery.models.quantizers.base import Quantizer
from finery.options import Finding

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["TorchAO"]

GROUP = 64
"""Weights of a row that share a scale in 4 bits."""


class TorchAO(Quantizer):
    """Tensors that hold few bits inside of plain linear layers."""

    bits = (4, 8)
    checkpoints = ("torchao",)
    package = "torchao"

    def arguments(self, bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Without torchao's kernels (package mslk, for GPUs) 4 bits are kept in bytes: as exact, and as large as 8."""
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup
        from transformers import TorchAoConfig

        if bits == 8:
            return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
        if device.type == "cuda" and have("mslk"):
            return {"quantization_config": TorchAoConfig(Int4WeightOnlyConfig(group_size=GROUP))}
        from torch import int4  # type: ignore[attr-defined]

        return {"quantization_config": TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP)))}

    def finish(self, model: Any, bits: int | None, dtype: torch.dtype, device: torch.device) -> Any:
        """transformers 5.23 refuses adapters beside any but 8 bits, though all formats give gradients to their inputs."""
        found = model.hf_quantizer
        if not found.is_trainable:
            found.__class__ = type(type(found).__name__, (type(found),), {"is_trainable": True})
        return model

    def holds(self, layer: nn.Module) -> bool:
        """A linear layer with one of torchao's tensors."""
        from torchao.utils import TorchAOBaseTensor

        return isinstance(getattr(layer, "weight", None), TorchAOBaseTensor)

    def plain_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """Widened, in `dtype`."""
        return layer.weight.dequantize().to(dtype)

    def bits_each(self, bits: int, dtype: torch.dtype) -> float:
        """8 bits have a scale a row; 4 bits, kept in bytes, a scale and a zero (a byte) for 64."""
        return 8.0 if bits == 8 else 8 + (8 * dtype.itemsize + 8) / GROUP

    def check(self, run: Any) -> Iterator[Finding]:
        """4 bits that are as large as 8 are told."""
        if run.quantization.quantization_bit == 4 and not have("mslk"):
            text = "is 4, which torchao keeps in bytes without its GPU kernels (mslk): as large as 8; 'bnb' and 'hqq' pack them"
            yield Finding("quantization_bit", text, fatal=False)
