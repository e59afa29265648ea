"""Supervised fine-tuning: cross entropy on the answers' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finery.data.rows.base import IGNORED, Row
from finery.methods.base import Loss, Method

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
        """Sum of -log p over supervised tokens, in fp32."""
        import torch.nn.functional as F

        labels_BT = batch["labels"][:, 1:]
        logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
        supervised_BT = labels_BT != IGNORED
        logits_SV = logits_BTV[supervised_BT].float()
        total = F.cross_entropy(logits_SV, labels_BT[supervised_BT], reduction="sum")
        return Loss(total, supervised_BT.sum())
