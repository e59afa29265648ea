"""Rows of conversations: the answers are learnt, the rest is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from finery.data.rows.base import IGNORED, Cut, Encoded, Row, Rows, lay, pad
from finery.data.sample import BadRecord, Sample
from finery.data.spelled import without_marks
from finery.data.template import Turn
from finery.data.tokenise import Asking
from finery.errors import UserError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["Chat"]


UNREAD_MEDIA = "it comes with images, videos or audios, which this stage does not read"


class Chat(Rows):
    """One row per conversation, or one per turn where the template rewrites history."""

    def draft(self, sample: Sample) -> Asking[_Draft]:
        """The pieces of a sample, cut to `cutoff_len` as `truncation` says."""
        if sample.unanswered:
            return _Draft((), sample.unanswered)
        if sample.has_media:
            return _Draft((), UNREAD_MEDIA)
        try:
            conversations = yield from self.template.turns(sample)
        except BadRecord as error:
            return _Draft((), without_marks(str(error)))
        if self.options.mask_history:
            conversations = conversations[-1:]  # where each answer is a row of its own, the last one
        longest = max(sum(turn.size for turn in turns) for turns in conversations)
        pieces = [piece for turns in conversations for piece in self._pieces(turns)]
        noted = (Cut.TRAILING if sample.trailing else Cut.NOTHING) | (Cut.PER_TURN if conversations[0][0].alone else Cut.NOTHING)
        return _Draft(pieces, "", longest, noted)

    def finish(self, drafts: Sequence[_Draft]) -> list[Encoded]:
        """Arrays for all pieces together, of which each row has its part."""
        pieces = [piece for draft in drafts for piece in draft.pieces if piece.ids]
        ids = np.asarray(list(chain.from_iterable(piece.ids for piece in pieces)), np.int32)
        sizes = np.asarray([len(piece.ids) for piece in pieces], np.int64)
        starts = np.cumsum(sizes) - sizes
        labels = _labels(pieces, starts, ids)
        learnt = labels != IGNORED
        learnt[starts] = False  # the first token of a row is never predicted
        counts = iter(np.add.reduceat(learnt, starts, dtype=np.int64).tolist() if len(pieces) else ())
        places = iter(zip(starts.tolist(), (starts + sizes).tolist(), strict=True))
        found = []
        for draft in drafts:
            rows, num_cut, num_supervised, lost = [], 0, 0, draft.lost
            for piece in draft.pieces:
                num_cut += piece.num_cut
                if not piece.ids:
                    continue
                (start, end), supervised = next(places), next(counts)
                if supervised:
                    rows.append(Row(ids[start:end], labels[start:end]))
                    num_supervised += supervised
                    lost |= piece.lost
                else:
                    num_cut += end - start
            reason = draft.reason if rows or draft.reason else self._why_nothing(draft.longest)
            found.append(Encoded(tuple(rows), reason, num_cut, lost, num_supervised))
        return found

    def _why_nothing(self, longest: int) -> str:
        if longest + (self.template.late_end is not None) <= self.options.cutoff_len:
            return "the answer is empty, or none is to be learnt"
        return f"longer than cutoff_len {self.options.cutoff_len}: " + (
            "left out, as 'truncation: drop' asks" if self.options.truncation == "drop" else "nothing of the answer is left"
        )

    def _pieces(self, turns: Sequence[Turn]) -> list[_Piece]:
        """The parts of a conversation that become rows, or none that do."""
        options, learnt = self.options, self._learnt(turns)
        size = sum(turn.size for turn in turns) + (self.template.late_end is not None)
        if size > options.cutoff_len and options.truncation == "proportional":
            return [self._shortened(turns, learnt)]
        whole = _Piece(self.template.late_end)
        for turn, learn in zip(turns, learnt, strict=True):
            whole.add(turn.source, turn.target, turn.tail, learn, options.train_on_prompt)
        whole.close()
        if size <= options.cutoff_len:
            return [whole]
        if options.truncation == "error":
            raise UserError(f"the row has {size} tokens, more than cutoff_len {options.cutoff_len}, and 'truncation: error' asks to stop")
        return list(whole.cut(options.truncation, options.cutoff_len))

    def _learnt(self, turns: Sequence[Turn]) -> list[bool]:
        """Which answers are learnt."""
        last = len(turns) - 1
        return [turn.learn and (place == last or not self.options.mask_history) for place, turn in enumerate(turns)]

    def _shortened(self, turns: Sequence[Turn], learnt: Sequence[bool]) -> _Piece:
        """Turn by turn, shared between question and answer; with `mask_history` the last turns come first.

        This is the rule that users' files were made for (reference: LLaMA-Factory 0.9.5).
        """
        room = self.options.cutoff_len - (self.template.late_end is not None)
        order = range(len(turns) - 1, -1, -1) if self.options.mask_history else range(len(turns))
        kept: dict[int, tuple[int, int]] = {}
        for place in order:
            if room <= 0:
                break
            turn = turns[place]
            kept[place] = share(len(turn.source), len(turn.target), room)
            room -= sum(kept[place])
        piece = _Piece(self.template.late_end)
        for place, turn in enumerate(turns):
            if place not in kept:
                piece.num_cut += len(turn.source) + len(turn.target) + len(turn.tail)
                continue
            num_source, num_target = kept[place]
            source, target = turn.source[:num_source], turn.target[:num_target]
            tail = turn.tail[: max(room, 0)] if num_target == len(turn.target) else ()  # nothing is left of the room for others
            if num_source < len(turn.source):
                piece.lost |= Cut.HEADER_LOST
            if num_target < len(turn.target):
                piece.lost |= Cut.END_LOST
            piece.num_cut += len(turn.source) - num_source + len(turn.target) - num_target + len(turn.tail) - len(tail)
            piece.add(source, target, tail, learnt[place], self.options.train_on_prompt)
        piece.close()
        return piece

    def collate(self, rows: Sequence[Row], end_to_end: bool = False) -> dict[str, torch.Tensor]:
        """See `lay` and `pad`."""
        return lay(rows) if end_to_end else pad(rows)


@dataclass(frozen=True)
class _Draft:
    """What a sample becomes before its arrays are made."""

    pieces: Sequence[_Piece]
    reason: str = ""
    longest: int = 0  # tokens of its longest conversation, uncut
    lost: int = Cut.NOTHING


def _labels(pieces: Sequence[_Piece], starts: NDArray[np.int64], ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """The labels of pieces laid end to end: ids in the spans that are learnt, and end tokens where they are learnt late."""
    spans = [(at + start, at + end) for piece, at in zip(pieces, starts.tolist(), strict=True) for start, end in piece.spans]
    steps = np.zeros(len(ids) + 1, np.int8)
    if spans:
        bounds = np.asarray(spans, np.int64)
        np.add.at(steps, bounds[:, 0], 1)
        np.subtract.at(steps, bounds[:, 1], 1)
    labels = np.where(np.cumsum(steps[:-1], dtype=np.int8) > 0, ids, np.int32(IGNORED))
    for piece, at in zip(pieces, starts.tolist(), strict=True):
        for end in piece.ends:
            labels[at + end] = piece.late_end
    return labels


@dataclass
class _Piece:
    """A row while it grows: its tokens, and which spans of them are learnt.

    `late_end` is the end token of templates that write none after an answer: what follows the answer then stands where
    the end is learnt, and one end token closes the row.
    """

    late_end: int | None = None
    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # places where the end token is learnt though another stands there
    due: bool = False  # an answer was learnt whose end is still to come
    num_cut: int = 0
    lost: int = Cut.NOTHING

    def add(self, source: Sequence[int], target: Sequence[int], tail: Sequence[int], learn: bool, learn_source: bool) -> None:
        """One turn."""
        if self.due and source:
            self.ends.append(len(self.ids))
        start = len(self.ids) + len(source)
        if learn_source:
            self._learn(len(self.ids), start)
        if learn:
            self._learn(start, start + len(target))
        self.due = learn and self.late_end is not None
        self.ids += source
        self.ids += target
        self.ids += tail

    def close(self) -> None:
        """The end token of templates that write it once."""
        if self.late_end is not None:
            if self.due:
                self._learn(len(self.ids), len(self.ids) + 1)
            self.ids.append(self.late_end)

    def _learn(self, start: int, end: int) -> None:
        if start < end:
            self.spans.append((start, end))

    def cut(self, how: str, most: int) -> list[_Piece]:
        """What `keep_start`, `keep_end`, `split` or `drop` leave of a row that is too long; `num_cut` is what they take."""
        size = len(self.ids)
        if how == "drop":
            return [_Piece(num_cut=size)]
        if how == "split":
            return [self._part(start, min(start + most, size)) for start in range(0, size, most)]
        part = self._part(0, most) if how == "keep_start" else self._part(size - most, size)
        part.num_cut = size - most
        return [part]

    def _part(self, start: int, end: int) -> _Piece:
        spans = [(max(a, start) - start, min(b, end) - start) for a, b in self.spans if a < end and b > start]
        lost = Cut.NOTHING
        if any(a < end < b for a, b in self.spans):
            lost |= Cut.END_LOST
        if start:
            lost |= Cut.HEADER_LOST
        return _Piece(self.late_end, self.ids[start:end], spans, [at - start for at in self.ends if start <= at < end], lost=lost)


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
