"""Packing: rows laid together until a pack is full, best fit over the whole set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finery.data.order import Places
from finery.options import Finding, OptionGroup


class PackingOptions(OptionGroup):
    packing: bool | None = None
    """Lay rows together until they fill cutoff_len: what a step counts is then a pack. Rows of a pack do not see each other.
    Pretraining packs unless this is false: texts are laid end to end and cut into blocks."""
    neat_packing: bool = False
    """The same as packing, which isolates rows anyway."""
    packing_contaminated: bool = False
    """Packs in which rows see those before them, as older tools made them."""

    def packs(self, answers: bool) -> bool:
        """Whether rows are packed; `answers` says whether the stage learns from answers."""
        return bool(self.neat_packing or self.packing_contaminated or (self.packing if self.packing is not None else not answers))

    def check(self, run: Any) -> Iterator[Finding]:
        """Packing cannot be off and on at once."""
        for key in ("neat_packing", "packing_contaminated"):
            if getattr(self, key) and self.packing is False:
                yield Finding(key, "means packing, but 'packing' is false: keep one")
            if getattr(self, key) and run.method.rows == "text":
                yield Finding(key, "is about rows of conversations; this stage lays texts end to end, and 'packing' alone says whether")
        if self.neat_packing and self.packing_contaminated:
            yield Finding("packing_contaminated", "and 'neat_packing' exclude each other: rows see each other, or they do not")


@dataclass(frozen=True)
class Packs:
    """Rows by pack: pack i holds the (sample, row) pairs from `ends[i - 1]` to `ends[i]`."""

    members: NDArray[np.int64]  # rows in the order of packs: (R, 2)
    ends: Places
    lengths: Places  # tokens of each pack

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        return self.members[int(self.ends[pack - 1]) if pack else 0 : int(self.ends[pack])]


def make_packs(samples: Places, numbers: NDArray[np.int32], lengths: NDArray[np.int32], capacity: int) -> Packs:
    """Pack rows, given by sample, number and length; in a pack they keep the order of the files."""
    packs = best_fit(lengths, capacity)
    order = np.argsort(packs, kind="stable")
    counts = np.bincount(packs)
    tokens = np.bincount(packs, weights=lengths).astype(np.int64)
    members = np.stack([samples[order], numbers[order].astype(np.int64)], axis=1)
    return Packs(members, np.cumsum(counts, dtype=np.int64), tokens)


def best_fit(lengths: NDArray[np.int32], capacity: int) -> Places:
    """The pack of each row: longest rows first, each into the fullest pack that still holds it (best-fit decreasing).

    Rows of one length are dealt with together, so the work grows with the number of different lengths and not of rows.
    Packs are numbered by their first row. A row longer than `capacity` has a pack of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    result = np.empty(len(lengths), np.int64)
    room: dict[int, list[NDArray[np.int64]]] = {}  # packs by the room that is left in them
    open_rooms = np.zeros(capacity + 1, bool)
    num_packs = 0
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    for size, rows in zip((-sizes).tolist(), np.split(order, firsts[1:]), strict=True):
        left = rows
        while len(left):
            fitting = np.flatnonzero(open_rooms[size:])
            if len(fitting):
                space = size + int(fitting[0])
                packs = np.concatenate(room.pop(space))
                open_rooms[space] = False
            else:
                space = max(capacity, size)
                packs = np.arange(num_packs, num_packs + -(-len(left) // (space // size)), dtype=np.int64)
                num_packs += len(packs)
            each = space // size  # one pack is filled before the next
            num_full, rest = divmod(min(len(left), each * len(packs)), each)
            num_used = num_full + (rest > 0)
            placed, left = left[: num_full * each + rest], left[num_full * each + rest :]
            result[placed] = np.repeat(packs[:num_used], each)[: len(placed)]
            rooms = ((space - each * size, packs[:num_full]), (space - rest * size, packs[num_full:num_used]), (space, packs[num_used:]))
            for free, some in rooms:
                if free > 0 and len(some):
                    room.setdefault(free, []).append(some)
                    open_rooms[free] = True
    return _renumbered(result)


def _renumbered(packs: Places) -> Places:
    """Numbers in the order in which packs first appear, so that packs stand where their first row stood."""
    _, first, inverse = np.unique(packs, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse]
