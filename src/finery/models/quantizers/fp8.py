"""Blockwise FP8, as DeepSeek-V3 and its kin come (arXiv 2412.19437): widened while they are loaded, and then plain models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finery.models.quantizers.base import Quantizer

if TYPE_CHECKING:
    import torch

__all__ = ["FP8"]


class FP8(Quantizer):
    """Everything can be done with the widened model: full fine-tuning, adapters, merging."""

    checkpoints = ("fp8",)
    widens = True

    def opening(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Widened on every device, so that a run is the same everywhere."""
        from transformers import FineGrainedFP8Config

        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
