"""MXFP4, as gpt-oss comes (OCP Microscaling Formats, 2023): widened while it is loaded, and then a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finery.models.quantizers.base import Quantizer

if TYPE_CHECKING:
    import torch

__all__ = ["MXFP4"]


class MXFP4(Quantizer):
    """Everything can be done with the widened model: full fine-tuning, adapters, merging."""

    checkpoints = ("mxfp4",)
    widens = True

    def opening(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Widened on every device, so that a run is the same everywhere."""
        from transformers.utils.quantization_config import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
