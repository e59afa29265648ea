"""The loss of every row in every step, in Parquet files that name where each row comes from.

A folder `loss_ledger` of parts, each written beside and renamed. One line for each step and each sample in it:
`step` · `dataset` and `file` (dictionaries) · `row` in that file, from 0 · `loss`, the mean over the row's supervised tokens as it was
trained (a router's loss is left out) · `tokens`, how many these are · `sharers`, how many samples share this loss: 1, unless rows were cut
out of one long text, where nobody can tell whose a token is. A sample that yields several rows has a line for each.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finery.data.rows.base import IGNORED, Row
from finery.data.sets import SampleSet
from finery.errors import UserError
from finery.log import get_logger

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

log = get_logger(__name__)

FOLDER = "loss_ledger"
ROWS_A_PART = 4096
"""A part is written when so many lines have come together; at every checkpoint and at the end in any case."""
WINDOW, FEWEST, SPREADS, LEAST_RATIO = 50, 10, 6, 1.5
"""A step stands out where its loss is half above the median of the last 10, and 6 spreads above it: the median deviation of the
differences between one step and the next, of the last 50, which neither a fall of the whole course nor an earlier leap makes large."""
QUIET_STEPS = 50
"""After a warning, so many steps pass without another."""


@dataclass(frozen=True)
class Cost:
    """What one row, or one sample in it, cost in a step."""

    places: tuple[int, ...]  # of its samples, in their set
    total: float  # sum over its supervised tokens
    tokens: int

    @property
    def mean(self) -> float:
        """Of a supervised token."""
        return self.total / self.tokens


Heard = Sequence[tuple[Sequence[Row], Sequence["Tensor"]]]
"""Micro-batches: their rows, and what each supervised token of theirs cost, in pieces."""


def costs_of(rows: Sequence[Row], heard: Heard) -> list[Cost]:
    """What each of a step's rows cost, in their order; rows without supervised tokens are left out.

    Of a row that was heard several times, since memory was used up and the step done again, the last time counts.
    """
    import torch

    pieces = [(id(row), *piece) for part, _ in heard for row in part for piece in enumerate(_pieces(row))]
    told = [cost for _, costs in heard for cost in costs]  # nothing at all, perhaps, where no token is supervised
    each = torch.cat(told).float().cpu().numpy() if told else np.zeros(0, np.float32)
    tokens = np.asarray([count for _, _, (_, count) in pieces], np.int64)
    assert tokens.sum() == len(each), f"{tokens.sum()} supervised tokens, and {len(each)} losses"
    totals = np.bincount(np.repeat(np.arange(len(pieces)), tokens), each, len(pieces)).tolist()  # summed in fp64
    found: dict[int, dict[int, Cost]] = {id(row): {} for row in rows}
    for (row, number, (places, count)), total in zip(pieces, totals, strict=True):
        if count and row in found:  # a rank without rows works on a silent one
            found[row][number] = Cost(places, total, count)
    return [cost for row in rows for cost in found[id(row)].values()]


def _pieces(row: Row) -> Iterator[tuple[tuple[int, ...], int]]:
    """The samples in a row, and how many supervised tokens they have: apart, where positions begin anew in each."""
    starts = np.flatnonzero(row.positions == 0) if row.positions is not None else ()
    if len(starts) != len(row.origin) or len(starts) < 2:
        yield row.origin, row.num_supervised
        return
    learnt = row.labels != IGNORED
    learnt[0] = False  # nothing predicts it
    yield from zip(((place,) for place in row.origin), np.add.reduceat(learnt, starts, dtype=np.int64).tolist(), strict=True)


class Ledger:
    """Writes the ledger of one process; every process has parts of its own."""

    def __init__(self, folder: Path, samples: SampleSet, rank: int = 0) -> None:
        self.folder = folder
        self.samples = samples
        self.rank = rank
        self._lines: list[tuple[int, int, float, int, int]] = []
        self._troubled = False

    def begin(self, step: int) -> None:
        """Training goes on after this step: lines of later ones are of a run that was cut off, and are taken out."""
        import pyarrow.compute as pc

        if self.rank != 0:  # the first process sees to all parts: there may have been more processes before
            return
        for path in self.folder.glob("*.new"):
            path.unlink()
        for path in sorted(self.folder.glob("*.parquet")):
            _, first, last = (int(number) for number in path.stem.split("-"))
            if last > step:
                if first <= step:
                    _write(_read(path).filter(pc.field("step") <= step), path.with_stem(f"{path.stem.rpartition('-')[0]}-{step:09d}"))
                path.unlink()

    def add(self, step: int, costs: Sequence[Cost]) -> None:
        """All that a step cost."""
        self._lines += [(step, place, cost.mean, cost.tokens, len(cost.places)) for cost in costs for place in cost.places]
        if len(self._lines) >= ROWS_A_PART:
            self.try_flush()

    def try_flush(self) -> None:
        """As `flush`, but a disk's trouble is told, not raised: the lines are kept, and tried again with the next step."""
        try:
            self.flush()
        except OSError as error:
            if not self._troubled:
                log.warning("the loss ledger cannot be written (%s); it is tried again", error.strerror or error)
            self._troubled = True

    def flush(self) -> None:
        """Write what has come together; a checkpoint counts on it."""
        if not self._lines:
            return
        import pyarrow as pa

        steps, places, losses, tokens, sharers = (np.asarray(column) for column in zip(*self._lines, strict=True))
        names, files, rows = self._located(places)
        table = pa.table(
            {
                "step": pa.array(steps, pa.int32()),
                "dataset": pa.array(names, pa.string()).dictionary_encode(),
                "file": pa.array(files, pa.string()).dictionary_encode(),
                "row": pa.array(rows, pa.int64()),
                "loss": pa.array(losses, pa.float32()),
                "tokens": pa.array(tokens, pa.int32()),
                "sharers": pa.array(sharers, pa.int32()),
            }
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(table, self.folder / f"{self.rank:03d}-{steps[0]:09d}-{steps[-1]:09d}.parquet")
        self._lines = []
        self._troubled = False

    def _located(self, places: NDArray[np.int64]) -> tuple[list[str], list[str], list[int]]:
        sources, records = self.samples.part.locate(places)
        found = [(self.samples.sources[source], record) for source, record in zip(sources.tolist(), records.tolist(), strict=True)]
        files, rows = zip(*(source.file_row(record) for source, record in found), strict=True)
        return [source.name for source, _ in found], [str(file) for file in files], list(rows)


def _write(table: pa.Table, path: Path) -> None:
    """The whole file, or none."""
    import pyarrow.parquet as parquet

    beside = path.with_suffix(".new")
    parquet.write_table(table, beside)
    beside.replace(path)


def _read(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no part of a loss ledger, or is damaged: {str(error).splitlines()[0]}") from None


def read_ledger(folder: Path) -> pa.Table:
    """All parts as one table, step by step; raises `UserError` where there is none."""
    import pyarrow as pa

    parts = [_read(path) for path in sorted(folder.glob("*.parquet"))]
    if not parts:
        raise UserError(f"there is no loss ledger in {folder}: train with 'loss_ledger: true'")
    return pa.concat_tables(parts).unify_dictionaries().combine_chunks().sort_by("step")  # a stable sort


def last_losses(table: pa.Table) -> list[dict[str, Any]]:
    """For each sample its loss in the last step that it was in, the highest first; what is no number is the highest of all."""
    columns = {name: table[name].to_numpy() for name in ("step", "row", "loss", "tokens", "sharers")}
    codes = [table[name].combine_chunks().indices.to_numpy() for name in ("dataset", "file")]
    keys, sample = np.unique(np.stack([*codes, columns["row"]], axis=1), axis=0, return_inverse=True)
    sample = sample.reshape(-1)
    last = np.zeros(len(keys), np.int64)
    np.maximum.at(last, sample, columns["step"])
    newest = columns["step"] == last[sample]
    sample, loss, tokens = sample[newest], columns["loss"][newest].astype(np.float64), columns["tokens"][newest]
    sums = np.bincount(sample, loss * tokens, len(keys))  # of all its rows in that step
    counts, sharers = np.bincount(sample, tokens, len(keys)).astype(np.int64), np.ones(len(keys), np.int64)
    np.maximum.at(sharers, sample, columns["sharers"][newest])
    means = sums / counts
    names, files = (table[name].combine_chunks().dictionary.to_pylist() for name in ("dataset", "file"))
    return [
        {
            "dataset": names[keys[place, 0]],
            "file": files[keys[place, 1]],
            "row": int(keys[place, 2]),
            "loss": float(means[place]),
            "tokens": int(counts[place]),
            "step": int(last[place]),
            "sharers": int(sharers[place]),
        }
        for place in np.argsort(-np.where(np.isnan(means), np.inf, means), kind="stable").tolist()
    ]


class Course:
    """The course of a run's loss, and which steps stand out from it."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=WINDOW)
        self._quiet = 0

    def stands_out(self, loss: float) -> float | None:
        """The median of the last steps where this one is far above it, and no other has been told of lately."""
        usual, told = None, False
        if len(self._seen) >= FEWEST:
            seen = list(self._seen)
            usual = statistics.median(seen[-FEWEST:])
            moves = [one - before for before, one in pairwise(seen)]
            middle = statistics.median(moves)
            spread = statistics.median(abs(move - middle) for move in moves)
            told = loss > max(usual + SPREADS * spread, LEAST_RATIO * usual) and not self._quiet
        self._quiet = QUIET_STEPS if told else max(self._quiet - 1, 0)
        if loss == loss:  # what is no number has no place in an order
            self._seen.append(loss)
        return usual if told else None
