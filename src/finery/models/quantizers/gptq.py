"""GPTQ (Frantar et al., 2022, arXiv 2210.17323): models that come quantised; adapters are trained beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finery.models.quantizers.base import Quantizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["GPTQ"]

TORCH_LAYERS = ("TorchQuantLinear", "TorchAtenLinear", "TorchLinear", "TorchFusedQuantLinear")
"""What gptqmodel calls its layers in plain torch."""


class GPTQ(Quantizer):
    """Read by gptqmodel. To make such a model is a matter of `finery export`."""

    checkpoints = ("gptq",)
    package = "gptqmodel"

    def opening(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """In plain torch: other layers of gptqmodel lose the way back to the inputs once they have answered without gradients."""
        from transformers import GPTQConfig

        return {"quantization_config": GPTQConfig(bits=int(config["bits"]), backend="torch")}

    def holds(self, layer: nn.Module) -> bool:
        """gptqmodel's layers in torch."""
        return type(layer).__name__ in TORCH_LAYERS

    def plain_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """Widened, in `dtype`; gptqmodel holds them (inputs, outputs)."""
        return layer.dequantize_weight().t().to(dtype)
