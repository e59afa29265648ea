"""AQLM (Egiazarian et al., 2024, arXiv 2401.06118): models that come in 2 bits; adapters are trained beside them."""

from finery.models.quantizers.base import Quantizer

__all__ = ["AQLM"]


class AQLM(Quantizer):
    """Read by the package aqlm."""

    checkpoints = ("aqlm",)
    package = "aqlm"
