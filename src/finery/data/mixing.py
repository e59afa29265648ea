"""Which record of which data set a sample is: drawing, mixing and holding out are arithmetic on places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from finery.data.order import Places, mix, permute
from finery.errors import UserError

STRATEGIES = ("concat", "interleave_under", "interleave_over", "interleave_once")
_DRAWS = 1000
"""So many sources are drawn at a time, as `datasets` does: one seed gives one order there and here."""
_MOST_TIMES, _MOST_SAMPLES = 1000, 10_000_000
"""A mixture that deals more samples than so many, and than so many times its rows, is a slip."""


@dataclass(frozen=True)
class Selection:
    """Which rows of one data set a run takes: a part of its split, so many drawn, the first so many of that."""

    first: int
    num_rows: int  # of the part
    num_drawn: int | None = None
    most: int | None = None
    seed: int = 0

    def __len__(self) -> int:
        size = self.num_rows if self.num_drawn is None else self.num_drawn * (self.num_rows > 0)
        return size if self.most is None else min(size, self.most)

    def rows(self, places: Places) -> Places:
        """The rows at places of the selection; drawn rows come in random order, again in another where there are too few."""
        if self.num_drawn is None:
            return places + self.first
        rows = np.empty_like(places)
        turns = places // self.num_rows
        for turn in np.unique(turns):
            inside = turns == turn
            rows[inside] = permute(places[inside] % self.num_rows, self.num_rows, mix(self.seed, 1 + int(turn)))
        return rows + self.first


class Mixture:
    """Several selections made one set of samples."""

    def __init__(self, selections: Sequence[Selection], strategy: str = "concat", probs: Sequence[float] = (), seed: int = 0) -> None:
        self.selections = selections
        sizes = np.asarray([len(selection) for selection in selections], np.int64)
        self.sizes = sizes
        self.strategy = strategy if len(selections) > 1 else "concat"
        self._drawn: NDArray[np.uint16] | None = None
        self._nth: Places = np.zeros(0, np.int64)
        if self.strategy == "concat":
            self.size = int(sizes.sum())
        elif probs:
            self._drawn, self._nth = _draw(sizes, np.asarray(probs, np.float64), self.strategy, seed)
            self.size = len(self._drawn)
        else:
            self._stretches = list(_stretches(sizes, self.strategy))
            self.size = sum(length * len(active) for _, length, active in self._stretches)

    def __len__(self) -> int:
        return self.size

    def locate(self, places: Places) -> tuple[NDArray[np.int64], Places]:
        """The data set of each place, and the row there."""
        sources, nth = self._find(np.asarray(places, np.int64))
        rows = np.empty_like(nth)
        for source, selection in enumerate(self.selections):
            inside = sources == source
            if inside.any():
                rows[inside] = selection.rows(nth[inside])
        return sources, rows

    def _find(self, places: Places) -> tuple[NDArray[np.int64], Places]:
        if self.strategy == "concat":
            ends = np.cumsum(self.sizes)
            sources = np.searchsorted(ends, places, side="right")
            return sources, places - (ends - self.sizes)[sources]
        if self._drawn is not None:
            return self._drawn[places].astype(np.int64), self._nth[places]
        sources, nth = np.empty_like(places), np.empty_like(places)
        begin = 0
        for first, length, active in self._stretches:
            inside = (places >= begin) & (places < begin + length * len(active))
            turn, who = np.divmod(places[inside] - begin, len(active))
            sources[inside], nth[inside] = active[who], first + turn
            begin += length * len(active)
        return sources, nth % self.sizes[sources]


def _stretches(sizes: NDArray[np.int64], strategy: str) -> list[tuple[int, int, NDArray[np.int64]]]:
    """Stretches in which the same sources take turns: the first turn, how many, and who."""
    everyone = np.arange(len(sizes))
    if strategy != "interleave_once":
        return [(0, int(sizes.min() if strategy == "interleave_under" else sizes.max() * (sizes.min() > 0)), everyone)]
    edges = [0, *np.unique(sizes[sizes > 0]).tolist()]
    return [(first, last - first, everyone[sizes > first]) for first, last in pairwise(edges)]


def _draw(sizes: NDArray[np.int64], probs: NDArray[np.float64], strategy: str, seed: int) -> tuple[NDArray[np.uint16], Places]:
    """Sources drawn by their weight until the strategy is satisfied, and which of its rows each draw is."""
    weights = probs / probs.sum()
    if bool((sizes[weights > 0] == 0).any()):
        raise UserError("'interleave_probs' gives weight to a data set that has no rows")
    _check_weights(sizes, weights, strategy)
    dice = np.random.default_rng(seed)
    wanted = {"interleave_under": any, "interleave_over": all, "interleave_once": all}[strategy]
    counts = np.zeros(len(sizes), np.int64)
    parts = []
    while not wanted((counts >= sizes)[weights > 0].tolist()):
        part = dice.choice(len(sizes), size=_DRAWS, p=weights).astype(np.uint16)
        parts.append(part)
        counts += np.bincount(part, minlength=len(sizes))
    drawn = np.concatenate(parts)
    nth = np.empty(len(drawn), np.int64)
    full = []
    for source, size in enumerate(sizes):
        places = np.flatnonzero(drawn == source)
        nth[places] = np.arange(len(places))
        if weights[source] > 0 and len(places) >= size:  # one that is used up ends `interleave_under`, others need not be
            full.append(int(places[size - 1]))
    if strategy == "interleave_once":
        keep = nth < sizes[drawn]
        return drawn[keep], nth[keep]
    end = 1 + (min(full) if strategy == "interleave_under" else max(full))
    return drawn[:end], nth[:end] % sizes[drawn[:end]]


def _check_weights(sizes: NDArray[np.int64], weights: NDArray[np.float64], strategy: str) -> None:
    """Raise `UserError` where a weight is so small that its data set would never be used up."""
    counted = weights > 0
    needed = np.where(counted, sizes / np.where(counted, weights, 1), 0)
    place = int(np.argmin(np.where(counted, needed, np.inf)) if strategy == "interleave_under" else np.argmax(needed))
    if needed[place] > max(_MOST_TIMES * int(sizes[counted].sum()), _MOST_SAMPLES):
        raise UserError(
            f"'interleave_probs': with a weight of {weights[place]:.3g}, all {int(sizes[place]):,} rows of data set {place + 1} would come "
            f"only after some {needed[place]:,.0f} samples; raise it, or choose another 'mix_strategy'"
        )


@dataclass(frozen=True)
class Part:
    """The samples of a mixture that one purpose takes: all of them, or those at `chosen` places, in the files' order."""

    mixture: Mixture
    chosen: Places | None = None

    def __len__(self) -> int:
        return len(self.mixture) if self.chosen is None else len(self.chosen)

    def locate(self, places: Places) -> tuple[NDArray[np.int64], Places]:
        """The data set of each place, and the row there."""
        return self.mixture.locate(places if self.chosen is None else self.chosen[places])


def hold_out(mixture: Mixture, size: float, seed: int) -> tuple[Part, Part]:
    """The rest, and `size` samples (a number, or a fraction below 1) drawn by `seed`; both keep the order of the files."""
    count = math.ceil(size * len(mixture)) if size < 1 else int(size)
    if count >= len(mixture):
        raise UserError(f"'val_size' takes {count} of {len(mixture)} samples and leaves none to train on")
    held = np.zeros(len(mixture), bool)
    held[permute(np.arange(count, dtype=np.int64), len(mixture), mix(seed, -1))] = True  # as no epoch has
    return Part(mixture, np.flatnonzero(~held)), Part(mixture, np.flatnonzero(held))
