"""Supervised fine-tuning: cross entropy on the answers' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finery.data.rows.base import Row
from finery.methods.base import Loss, Method, next_token_loss

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["SFT"]


class SFT(Method):
    """Learns to give the answers of a data set."""

    rows = "chat"

    def weight(self, rows: Sequence[Row]) -> int:
        """Supervised tokens."""
        return sum(row.num_supervised for row in rows)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """See `next_token_loss`."""
        return next_token_loss(model, batch)
