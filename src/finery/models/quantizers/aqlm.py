"""AQLM (Egiazarian et al., 2024, arXiv 2401.06118): models that come in 2 bits; adapters are trained beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finery.compat import need
from finery.models.quantizers.base import Quantizer

if TYPE_CHECKING:
    import torch

__all__ = ["AQLM"]


class AQLM(Quantizer):
    """Read by the package aqlm."""

    checkpoints = ("aqlm",)
    package = "aqlm"
    install = "pip install aqlm[gpu,cpu]"

    def opening(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The model tells all by itself."""
        need("aqlm", "the model comes quantised by AQLM")
        return {}
