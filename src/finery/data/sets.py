"""What the loop deals: units of rows, a sample or a pack each, read from the stores that the encoder fills."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finery.data.content import Rate
from finery.data.encoder import LOOKAHEAD, Encoder
from finery.data.mixing import Part
from finery.data.order import Places
from finery.data.packing import Packs
from finery.data.rows.base import Encoded, Row, Rows
from finery.data.sample import BadRecord
from finery.data.sources import Source
from finery.data.store import ENTRY, TokenStore
from finery.errors import UserError

_WATCHED = 1 << 11
_LOOK_SECONDS = 0.05
_PIECE = 1 << 16
"""So many entries are looked at a time, where all are looked at."""


@dataclass
class SampleSet:
    """Units of training: unit i is sample i with all rows that it yields; a sample may yield none."""

    name: str
    part: Part
    sources: Sequence[Source]
    stores: Sequence[TokenStore]
    rows: Rows
    feed: int = 0  # its number among the encoder's
    encoder: Encoder | None = None  # set when encoding begins

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, unit: int) -> list[Row]:
        return self.of_sample(unit)

    def of_sample(self, place: int) -> list[Row]:
        """The rows of a sample; waits until it is encoded."""
        source, record = self.locate(place)
        store = self.stores[source]
        if self.encoder is not None:
            self.encoder.wait(store, record)
        rows = store.read(record)
        # never encoded, or damaged on the disk
        rows = list(self.encode_now(place).rows) if rows is None else rows
        return [replace(row, origin=(place,)) for row in rows]

    def told(self, place: int) -> str:
        """Where a sample comes from, for people: its data set, file and line or row."""
        source, record = self.locate(place)
        return self.sources[source].told(record)

    def encode_now(self, place: int) -> Encoded:
        """A sample as the encoder's processes make it, made here."""
        source, record = self.locate(place)
        try:
            return self.rows.encode(self.sources[source].sample(record))
        except BadRecord as error:
            return Encoded((), str(error))
        except UserError as error:
            raise UserError(*(f"{self.sources[source].told(record)}: {line}" for line in error.complaints)) from None

    def locate(self, place: int) -> tuple[int, int]:
        """The data set of a sample, and its record there."""
        sources, records = self.part.locate(np.asarray([place], np.int64))
        return int(sources[0]), int(records[0])

    def begin(self, place: int) -> None:
        """The loop begins at a place, epochs counted through."""
        if self.encoder is not None:
            self.encoder.seek(self.feed, place)

    def advance(self, place: int, num_ahead: int) -> None:
        """The loop is at a place and takes `num_ahead` samples next; raises what has gone wrong with the encoding."""
        if self.encoder is not None:
            self.encoder.want(self.feed, place + max(4 * num_ahead, LOOKAHEAD))
        for store in self.stores:
            store.let_go()

    def encode_all(self) -> None:
        """Wait until every sample is encoded, saying how fast it goes."""
        if self.encoder is None:
            return
        self.encoder.seek(self.feed, 0)
        self.encoder.want(self.feed, len(self))
        rate, start = Rate(f"encoding {self.name}", "samples", len(self)), 0
        while start < len(self):
            stop = min(start + _WATCHED, len(self))
            found = self._entries(start, stop)
            reached = start + (len(found) if found["present"].all() else int(np.argmin(found["present"])))
            rate.add(reached - start)
            start = reached
            if reached < stop:
                rate.add(0)
                self.encoder.check()
                time.sleep(_LOOK_SECONDS)  # seldom: every look takes time from those who encode
        rate.end()

    def _entries(self, start: int, stop: int) -> NDArray[Any]:
        sources, records = self.part.locate(np.arange(start, stop, dtype=np.int64))
        found = np.zeros(stop - start, ENTRY)
        for number, store in enumerate(self.stores):
            inside = sources == number
            if inside.any():
                found[inside] = store.entries[records[inside]]
                store.let_go()
        return found

    def row_lengths(self) -> tuple[Places, NDArray[np.int32], NDArray[np.int32]]:
        """For each row of the set, all encoded: its sample, its number there, and its length in tokens."""
        samples, numbers, lengths = [], [], []
        for start in range(0, len(self), _PIECE):
            found = self._entries(start, min(start + _PIECE, len(self)))
            counts = found["num_rows"].astype(np.int64)
            place = np.repeat(np.arange(start, start + len(found)), counts)
            size = np.repeat(found["num_ids"], counts)
            firsts = np.cumsum(counts) - counts
            number = (np.arange(len(place)) - np.repeat(firsts, counts)).astype(np.int32)
            for unit in np.flatnonzero(counts > 1):  # their rows have lengths of their own
                size[firsts[unit] : firsts[unit] + counts[unit]] = [len(row.ids) for row in self.of_sample(start + int(unit))]
            samples.append(place)
            numbers.append(number)
            lengths.append(size)
        return np.concatenate(samples), np.concatenate(numbers), np.concatenate(lengths)

    @cached_property
    def lengths(self) -> Places:
        """Tokens of each unit, all encoded."""
        parts = [self._entries(start, min(start + _PIECE, len(self)))["num_ids"] for start in range(0, len(self), _PIECE)]
        return np.concatenate(parts).astype(np.int64)

    @property
    def samples(self) -> SampleSet:
        """The samples that the units hold."""
        return self


class PackedSet:
    """Units that are packs of rows: each row a segment of its own, or all of them one row where they may see each other."""

    def __init__(self, samples: SampleSet, packs: Packs, capacity: int, joined: bool) -> None:
        self.samples = samples
        self.packs = packs
        self.capacity = capacity
        self.joined = joined

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, unit: int) -> list[Row]:
        rows = [self.samples.of_sample(int(sample))[int(number)] for sample, number in self.packs[unit]]
        return [joined(rows)] if self.joined else rows

    def packs_of(self, sample: int) -> list[int]:
        """The packs that hold rows of a sample."""
        places = np.flatnonzero(self.packs.members[:, 0] == sample)
        return np.unique(np.searchsorted(self.packs.ends, places, side="right")).tolist()

    def begin(self, place: int) -> None:
        """Everything is encoded."""

    def advance(self, place: int, num_ahead: int) -> None:
        """Everything is encoded; raises what has gone wrong beside the training."""
        if self.samples.encoder is not None:
            self.samples.encoder.check()

    @property
    def lengths(self) -> Places:
        """Tokens of each unit."""
        return self.packs.lengths


class BlockSet:
    """Units that are blocks of one long text: all rows laid end to end, in the files' order, cut every `capacity` tokens."""

    def __init__(self, samples: SampleSet, capacity: int) -> None:
        self.samples = samples
        self.capacity = capacity
        self.owners, self.numbers, lengths = samples.row_lengths()
        self.ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.capacity) if len(self.ends) else 0

    def __getitem__(self, unit: int) -> list[Row]:
        start, stop = unit * self.capacity, min((unit + 1) * self.capacity, int(self.ends[-1]))
        first, last = np.searchsorted(self.ends, start, side="right"), np.searchsorted(self.ends, stop, side="left")
        parts, origin = [], []
        for place in range(int(first), int(last) + 1):
            origin.append(int(self.owners[place]))
            begin = int(self.ends[place - 1]) if place else 0
            ids = self.samples.of_sample(int(self.owners[place]))[int(self.numbers[place])].ids
            parts.append(ids[max(start - begin, 0) : stop - begin])
        ids = np.concatenate(parts)
        return [Row(ids, ids, origin=tuple(dict.fromkeys(origin)))] if len(ids) > 1 else []

    def begin(self, place: int) -> None:
        """Everything is encoded."""

    def advance(self, place: int, num_ahead: int) -> None:
        """Everything is encoded; raises what has gone wrong beside the training."""
        if self.samples.encoder is not None:
            self.samples.encoder.check()

    @property
    def lengths(self) -> Places:
        """Tokens of each unit."""
        sizes = np.full(len(self), self.capacity, np.int64)
        if len(sizes):
            sizes[-1] = int(self.ends[-1]) - (len(sizes) - 1) * self.capacity
        return sizes


def joined(rows: Sequence[Row]) -> Row:
    """Rows laid end to end as one, positions counted anew in each; its tokens see those of the rows before."""
    ids, labels = np.concatenate([row.ids for row in rows]), np.concatenate([row.labels for row in rows])
    positions = np.concatenate([np.arange(len(row.ids), dtype=np.int32) for row in rows])
    return Row(ids, labels, positions, tuple(place for row in rows for place in row.origin))


UnitSet = SampleSet | PackedSet | BlockSet
