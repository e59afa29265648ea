"""Rows of plain text, for pretraining: everything is learnt, an end token closes each text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from finery.data.rows.base import Cut, Encoded, Row, Rows, lay, pad
from finery.data.sample import Sample
from finery.data.tokenise import Asking
from finery.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["Text"]


class Text(Rows):
    """The text of a sample's first message; no template is used."""

    answers = False

    def draft(self, sample: Sample) -> Asking[Encoded]:
        """One row, or several where a long text is split; whole where the set is packed into blocks."""
        text = sample.messages[0].content
        if not text:
            return Encoded((), "the text is empty")
        ids = np.asarray((yield from self.template.text_ids(text)), np.int32)
        most, how = self.options.cutoff_len, self.options.truncation
        if self.whole or len(ids) <= most:
            return Encoded((Row(ids, ids),))
        if how == "error":
            raise UserError(f"the text has {len(ids)} tokens, more than cutoff_len {most}, and 'truncation: error' asks to stop")
        if how == "drop":
            return Encoded((), f"longer than cutoff_len {most}: left out, as 'truncation: drop' asks", len(ids))
        if how == "split":
            parts = [ids[start : start + most] for start in range(0, len(ids), most)]
            kept = [part for part in parts if len(part) > 1]  # one token alone has nothing to be predicted from
            return Encoded(tuple(Row(part, part) for part in kept), num_cut=len(ids) - sum(map(len, kept)))
        part = ids[-most:] if how == "keep_end" else ids[:most]
        return Encoded((Row(part, part),), num_cut=len(ids) - most, cut=Cut.HEADER_LOST if how == "keep_end" else Cut.END_LOST)

    def finish(self, drafts: Sequence[Encoded]) -> list[Encoded]:
        """Count what is learnt."""
        return [replace(one, num_supervised=sum(row.num_supervised for row in one.rows)) for one in drafts]

    def collate(self, rows: Sequence[Row], end_to_end: bool = False) -> dict[str, torch.Tensor]:
        """See `lay` and `pad`."""
        return lay(rows) if end_to_end else pad(rows)
