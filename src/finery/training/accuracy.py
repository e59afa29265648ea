"""Accuracy in evaluations: how many supervised tokens of a row are the likeliest ones, as a mean over rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from finery.data.rows.base import Row
from finery.methods.functions.guesses import guessed


class Accuracy:
    """Each row counts the same, however long its answers are: users' figures are such means."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._shares: list[float] = []

    @contextmanager
    def of(self, rows: Sequence[Row]) -> Iterator[None]:
        """Count what the loss of these rows, taken inside, finds; in any thread."""
        if not self.wanted:
            yield
            return
        with guessed() as hits:
            yield
        counts = [row.num_supervised for row in rows if row.num_supervised]
        if counts:
            self._shares += [float(part.float().mean()) for part in torch.cat(hits).cpu().split(counts)]

    def told(self, prefix: str, total: Callable[[float], float]) -> dict[str, float]:
        """`<prefix>_accuracy`, if it is wanted; `total` sums over all processes."""
        if not self.wanted:
            return {}
        right, rows = total(math.fsum(self._shares)), total(len(self._shares))
        return {f"{prefix}_accuracy": right / rows if rows else float("nan")}
