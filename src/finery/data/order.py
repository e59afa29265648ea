"""The order in which samples are dealt: a pure function of seed, epoch and place, found without laying out the whole."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]

_ROUNDS = 7


class Order(ABC):
    """An order of `size` samples, another one in every epoch or always the same."""

    def __init__(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def at(self, epoch: int, start: int, stop: int) -> Places:
        """The samples at places start … stop - 1 of an epoch; `stop` may be beyond the end."""


class Sequential(Order):
    """As the files have them."""

    def at(self, epoch: int, start: int, stop: int) -> Places:
        """The places themselves."""
        return np.arange(start, min(stop, self.size), dtype=np.int64)


class Shuffled(Order):
    """A random permutation of each epoch's own."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        self.seed = seed

    def at(self, epoch: int, start: int, stop: int) -> Places:
        """Computed for these places alone."""
        return permute(np.arange(start, min(stop, self.size), dtype=np.int64), self.size, mix(self.seed, epoch))


class ByLength(Order):
    """Shuffled, and within windows the longest first, so that rows of like length share a step."""

    def __init__(self, lengths: Places, seed: int, window: int) -> None:
        super().__init__(len(lengths))
        self.lengths = lengths
        self.window = max(window, 1)
        self.shuffled = Shuffled(self.size, seed)

    def at(self, epoch: int, start: int, stop: int) -> Places:
        """Sorted window by window; the first step of an epoch holds its window's longest."""
        first, last = start // self.window, -(-min(stop, self.size) // self.window)
        windows = [self._window(epoch, number) for number in range(first, last)]
        whole = np.concatenate(windows) if windows else np.zeros(0, np.int64)
        return whole[start - first * self.window : stop - first * self.window]

    def _window(self, epoch: int, number: int) -> Places:
        found = self.shuffled.at(epoch, number * self.window, (number + 1) * self.window)
        return found[np.argsort(-self.lengths[found], kind="stable")]


def mix(*numbers: int) -> int:
    """One 64-bit number out of several (splitmix64's finalizer, Steele et al. 2014, applied in turn)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


_MASK = (1 << 64) - 1


def permute(places: Places, size: int, seed: int) -> Places:
    """Where a random permutation of `size` things, drawn by `seed`, takes each of `places`.

    A Feistel network over the smallest square power of two that holds `size`, walked until a place within `size` is
    reached (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max((max(size - 1, 1).bit_length() + 1) // 2, 1))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(mix(seed, number)) for number in range(_ROUNDS)]
    found = places.astype(np.uint64)
    todo = np.arange(len(found))
    while len(todo):
        left, right = found[todo] >> half, found[todo] & low
        for key in keys:
            left, right = right, left ^ (_scramble(right ^ key) & low)
        found[todo] = (left << half) | right
        todo = todo[found[todo] >= size]
    return found.astype(np.int64)


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
