"""Encoded sets: rows of tokens in memory-mapped files, kept in a cache that is keyed by content."""

import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finery.compat import is_first
from finery.data.rows.base import Encoded, Row, Rows
from finery.data.sample import Sample
from finery.errors import UserError
from finery.files import cache_folder, digest, new_folder
from finery.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class EncodedSet:
    """Units of training: unit i is sample i, with all rows that it yields; a sample may yield none.

    `row_ends` (number of rows) index into `ids` and `labels`, `unit_ends` (number of samples) into the rows.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    row_ends: NDArray[np.int64]
    unit_ends: NDArray[np.int64]
    num_cut: int = 0
    notes: tuple[str, ...] = ()  # which samples yield no row, and why

    def __len__(self) -> int:
        return len(self.unit_ends)

    @property
    def num_rows(self) -> int:
        """Rows of all samples together."""
        return len(self.row_ends)

    def __getitem__(self, unit: int) -> list[Row]:
        first = int(self.unit_ends[unit - 1]) if unit else 0
        return [self._row(place) for place in range(first, int(self.unit_ends[unit]))]

    def _row(self, place: int) -> Row:
        begin, end = (int(self.row_ends[place - 1]) if place else 0), int(self.row_ends[place])
        return Row(np.asarray(self.ids[begin:end]), np.asarray(self.labels[begin:end]))

    @classmethod
    def of(cls, units: Sequence[Sequence[Row]], num_cut: int = 0, notes: tuple[str, ...] = ()) -> "EncodedSet":
        """A set in memory."""
        rows = [row for unit in units for row in unit]
        empty = np.zeros(0, np.int32)
        return cls(
            np.concatenate([row.ids for row in rows]) if rows else empty,
            np.concatenate([row.labels for row in rows]) if rows else empty,
            np.cumsum([len(row.ids) for row in rows], dtype=np.int64),
            np.cumsum([len(unit) for unit in units], dtype=np.int64),
            num_cut,
            notes,
        )

    def save(self, folder: Path) -> None:
        """Write the arrays as .npy files and the counts as JSON."""
        for name in ("ids", "labels", "row_ends", "unit_ends"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "set.json").write_text(json.dumps({"num_cut": self.num_cut, "notes": self.notes}), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> "EncodedSet":
        """Map a saved set into memory."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "labels", "row_ends", "unit_ends")}
        facts = json.loads((folder / "set.json").read_text(encoding="utf-8"))
        return cls(**arrays, num_cut=facts["num_cut"], notes=tuple(facts["notes"]))


def encode_samples(samples: list[Sample], rows: Rows, key: str, num_workers: int, overwrite: bool, part: str) -> EncodedSet:
    """Encode with `num_workers` processes, or take the same encoding from the cache unless `overwrite`.

    `key` names what shapes the tokens beside the samples; `part` is said in the log.
    """
    content = json.dumps([asdict(sample) for sample in samples], ensure_ascii=False)
    folder = cache_folder() / "encoded" / digest(code_version(), type(rows).__name__, key, content)
    if os.path.exists(folder / "set.json") and not overwrite:  # noqa: PTH110 -- Path.exists raises where the cache may not be read
        found = EncodedSet.open(folder)
        log.info("%s: %d samples, already encoded", part, len(found))
        _tell(part, found.notes)
        return found
    encoded = list(_encode(samples, rows, num_workers))
    found = EncodedSet.of([one.rows for one in encoded], sum(one.num_cut for one in encoded), _left_out(samples, encoded))
    _tell(part, found.notes)
    supervised = int((found.labels >= 0).sum())
    cut = f", {found.num_cut} tokens cut away at cutoff_len {rows.cutoff_len}" if found.num_cut else ""
    log.info("%s: %d samples, %d rows, %d tokens (%d learnt)%s", part, len(found), found.num_rows, len(found.ids), supervised, cut)
    if is_first():
        try:
            with new_folder(folder) as beside:
                found.save(beside)
        except (OSError, UserError) as error:
            log.warning("the encoded rows could not be kept in %s: %s", folder.parent, error)
    return found


@cache
def code_version() -> str:
    """A digest of the code that shapes tokens: another version of it never takes what this one has encoded."""
    return digest(*sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".yaml")))


def _tell(part: str, notes: Iterable[str]) -> None:
    for note in notes:
        log.warning("%s: %s", part, note)


def _left_out(samples: list[Sample], encoded: list[Encoded]) -> tuple[str, ...]:
    notes = []
    reasons = Counter(one.reason for one in encoded if not one.rows)
    for reason, count in reasons.items():
        first = [sample for sample, one in zip(samples, encoded, strict=True) if not one.rows and one.reason == reason][:3]
        places = ", ".join(f"{sample.dataset} row {sample.row}" for sample in first)
        notes.append(f"{count} samples yield no row ({places}{', …' if count > len(first) else ''}): {reason}")
    return tuple(notes)


_WORK: list[Rows] = []
"""What a worker process encodes with; filled before it is forked, or by its initializer."""


def _set_up(rows: Rows) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORK[:] = [rows]


def _encode_one(sample: Sample) -> Encoded:
    return _WORK[0].encode(sample)


def _encode(samples: list[Sample], rows: Rows, num_workers: int) -> Iterable[Encoded]:
    size = 64
    workers = min(num_workers, -(-len(samples) // size))
    if workers <= 1:
        return map(rows.encode, samples)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(workers, _set_up, (rows,)) as pool:
        log.info("encoding with %d processes", workers)
        return pool.map(_encode_one, samples, chunksize=size)
