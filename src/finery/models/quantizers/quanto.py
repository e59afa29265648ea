"""optimum-quanto: 8, 4 and 2 bits in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finery.models.quantizers.base import Quantizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["Quanto"]

GROUP = 128
"""Weights that share a scale and a shift in 4 and 2 bits; 8 bits have a scale a row."""


class Quanto(Quantizer):
    """Its layers are linear layers with packed weights; adapters are trained beside them, the weights themselves cannot be saved so."""

    bits = (2, 4, 8)
    checkpoints = ("quanto",)
    package = "optimum.quanto"

    def arguments(self, bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Weights alone; what flows between layers stays as it is."""
        from transformers import QuantoConfig

        return {"quantization_config": QuantoConfig(weights=f"int{bits}")}

    def holds(self, layer: nn.Module) -> bool:
        """quanto's own layers."""
        from optimum.quanto import QLinear

        return isinstance(layer, QLinear)

    def plain_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """Widened, in `dtype`."""
        return layer.weight.dequantize().to(dtype)

    def shows_lengths(self, bits: int) -> bool:
        """DoRA changes the format of weights, which quanto's tensors refuse."""
        return False

    def bits_each(self, bits: int, dtype: torch.dtype) -> float:
        """A scale and a shift for 128 weights, in the format of products."""
        return 8.0 if bits == 8 else bits + 2 * 8 * dtype.itemsize / GROUP
