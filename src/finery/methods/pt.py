"""Pretraining: cross entropy on every token of plain texts."""

from __future__ import annotations

from finery.methods.base import TokenMethod

__all__ = ["PT"]


class PT(TokenMethod):
    """Learns to go on with the texts of a data set."""

    rows = "text"
