"""AWQ (Lin et al., 2023, arXiv 2306.00978): models that come quantised; adapters are trained beside them."""

from finery.models.quantizers.base import Quantizer

__all__ = ["AWQ"]


class AWQ(Quantizer):
    """Read by gptqmodel, which transformers 5 asks for them."""

    checkpoints = ("awq",)
    package = "gptqmodel"
