"""AWQ (Lin et al., 2023, arXiv 2306.00978): models that come quantised; adapters are trained beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finery.compat import need
from finery.models.quantizers.base import Quantizer

if TYPE_CHECKING:
    import torch

__all__ = ["AWQ"]


class AWQ(Quantizer):
    """Read by gptqmodel, which transformers 5 asks for them."""

    checkpoints = ("awq",)
    package = "gptqmodel"
    install = "pip install gptqmodel optimum"

    def opening(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The model tells all by itself."""
        need("gptqmodel", "the model comes quantised by AWQ")
        return {}
