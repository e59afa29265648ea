"""Pretraining: cross entropy on every token of plain texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finery.data.rows.base import Row
from finery.methods.base import Loss, Method, next_token_loss

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PT"]


class PT(Method):
    """Learns to go on with the texts of a data set."""

    rows = "text"

    def weight(self, rows: Sequence[Row]) -> int:
        """Supervised tokens."""
        return sum(row.num_supervised for row in rows)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """See `next_token_loss`."""
        return next_token_loss(model, batch)
