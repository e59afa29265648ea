"""GPTQ (Frantar et al., 2022, arXiv 2210.17323): models that come quantised; adapters are trained beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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

        room_for_workers()
        return {"quantization_config": GPTQConfig(bits=int(config["bits"]), backend="torch")}

    def holds(self, layer: nn.Module) -> bool:
        """gptqmodel's layers in torch."""
        return type(layer).__name__ in TORCH_LAYERS

    def plain_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """Widened, in `dtype`; gptqmodel holds them (inputs, outputs)."""
        return layer.dequantize_weight().t().to(dtype)

    def tensors(self, layer: Any) -> Iterator[Tensor]:
        """gptqmodel's layers hold no weight: packed numbers and zeros, scales, and to which group each column belongs."""
        yield from (layer.qweight, layer.qzeros, layer.scales, layer.g_idx)


def room_for_workers() -> None:
    """gptqmodel 7.6 asks its pool for two workers and gives it one where there are two cores or fewer."""
    if (os.cpu_count() or 1) <= 2:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
