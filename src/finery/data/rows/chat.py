"""Rows of conversations: the answers are learnt, the rest is read."""

from collections.abc import Sequence

import numpy as np
import torch

from finery.data.rows.base import IGNORED, Encoded, Row, Rows
from finery.data.sample import BadRecord, Sample
from finery.data.template import Turn

__all__ = ["Chat"]


class Chat(Rows):
    """One row per conversation, or one per turn where the template rewrites history."""

    def encode(self, sample: Sample) -> Encoded:
        """Cut to `cutoff_len` as the reference does: turn by turn, shared between question and answer."""
        try:
            conversations = self.template.encode(sample)
        except BadRecord as error:
            return Encoded((), str(error))
        rows, num_cut = [], 0
        for turns in conversations:
            row, cut = self._row(turns)
            num_cut += cut
            if row.num_supervised:
                rows.append(row)
        if not rows:
            return Encoded((), "nothing of the answer is left within cutoff_len" if num_cut else "the answer is empty", num_cut)
        return Encoded(tuple(rows), num_cut=num_cut)

    def _row(self, turns: Sequence[Turn]) -> tuple[Row, int]:
        ids: list[int] = []
        labels: list[int] = []
        for turn in turns:
            room = self.cutoff_len - len(ids)
            if room <= 0:
                break
            num_source, num_target = share(len(turn.source), len(turn.target), room)
            source, target = turn.source[:num_source], turn.target[:num_target]
            tail = turn.tail[: room - num_source - num_target]  # none where the answer is cut: then nothing is left of the room
            ids += [*source, *target, *tail]
            labels += [IGNORED] * num_source + [*target] + [IGNORED] * len(tail)
        num_cut = sum(len(turn.source) + len(turn.target) + len(turn.tail) for turn in turns) - len(ids)
        return Row(np.asarray(ids, np.int32), np.asarray(labels, np.int32)), num_cut

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Pad on the right: `input_ids`, `attention_mask`, `labels`, each (B rows, T of the longest), int64."""
        longest = max(len(row.ids) for row in rows)
        input_ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(input_ids_BT)
        labels_BT = torch.full_like(input_ids_BT, IGNORED)
        for place, row in enumerate(rows):
            length = len(row.ids)
            input_ids_BT[place, :length] = torch.from_numpy(row.ids.astype(np.int64))
            labels_BT[place, :length] = torch.from_numpy(row.labels.astype(np.int64))
            mask_BT[place, :length] = 1
        return {"input_ids": input_ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def share(num_source: int, num_target: int, room: int) -> tuple[int, int]:
    """How many tokens of a question and its answer are kept in `room`.

    The rule that users' files were made for: an answer shorter than half the room is kept whole, else a short
    question is, else both are cut in proportion.
    """
    if 2 * num_target < room:
        most = room
    elif 2 * num_source < room:
        most = room - num_source
    else:
        most = room * num_target // (num_source + num_target)
    target = min(most, num_target)
    return min(max(room - target, 0), num_source), target
