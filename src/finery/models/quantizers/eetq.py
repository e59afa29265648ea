"""EETQ: 8 bits for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finery.models.quantizers.base import Quantizer
from finery.options import Finding

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["EETQ"]


class EETQ(Quantizer):
    """Its kernels hold a scale for every output; inputs are half precision."""

    bits = (8,)
    checkpoints = ("eetq",)
    package = "kernels"
    serves_others = True

    def arguments(self, bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """There is one format."""
        from transformers import EetqConfig

        return {"quantization_config": EetqConfig(weights="int8")}

    def holds(self, layer: nn.Module) -> bool:
        """EETQ's own layers, as transformers builds them."""
        return type(layer).__name__ == "EetqLinear"

    def is_exact(self, layer: nn.Module) -> bool:
        """Its kernels multiply in fp16."""
        return False

    def check(self, run: Any) -> Iterator[Finding]:
        """A GPU."""
        import torch

        if not torch.cuda.is_available():
            yield Finding("quantization_method", "is 'eetq', which needs an NVIDIA GPU; 'bnb', 'hqq' and 'torchao' hold 8 bits on a CPU")
