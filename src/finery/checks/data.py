"""Data: every row of every data set is read as training reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finery.checks.base import (
    NUM_FIRST,
    Check,
    Checked,
    Finding,
    Groups,
    Opened,
    open_rows,
    refusals,
    shown_path,
    unlearnable,
)
from finery.data.content import Rate
from finery.data.load import DataOptions
from finery.data.oddities import Oddities, repeated_key
from finery.data.registry import FILE, Catalogue, read_catalogue
from finery.data.rows import ROWS
from finery.data.sample import BadRecord, Sample
from finery.data.sources import WORDS
from finery.errors import UserError, suggestion

__all__ = ["Data"]

_MOST_COLUMNS = 10_000


class Data(Check):
    """Tells which rows training would leave out, and which it would take though hardly anybody means them to be learnt."""

    def findings(self, run: Any) -> Iterator[Finding]:
        """Of the data sets that a run trains and evaluates on."""
        yield from self.look(run.data, run.model.download, run.method)

    def look(self, options: DataOptions, download: Mapping[str, Any], method: Any = None) -> Iterator[Finding]:
        """Of the data sets that the options name; without a method, what their records are for is told from themselves."""
        catalogue = read_catalogue(options.dataset_dir, download) or Catalogue()
        opened: dict[str, _Pass | None] = {}
        for key in ("dataset", "eval_dataset"):
            for name in getattr(options, key):
                if name in opened:
                    continue
                found = yield from open_rows(key, name, options, download, catalogue, method)
                opened[name] = one = _Pass(found, method) if found is not None else None
                if one is not None:
                    began = time.monotonic()
                    try:
                        yield from one.findings(name in catalogue.entries)
                    except UserError as error:  # a stream that breaks off, say
                        yield from refusals(key, name, error)
                    self.checked.append(Checked(f"data set {name!r}", one.size, one.num_used, time.monotonic() - began, one.note))
        yield from _of_all(options, {name: one for name, one in opened.items() if one is not None})


class _Pass:
    """One reading of a data set from its first row to its last; of a row, only a hash is kept."""

    def __init__(self, opened: Opened, method: Any) -> None:
        self.source = source = opened.source
        self.first = opened.first
        self.size = size = opened.size
        self.folder = opened.folder
        self.note = " of a stream's" if source.sequential else "" if size == len(source) else f" of {len(source):,}"
        self.hashes: NDArray[np.uint64] = np.zeros(size, np.uint64)  # of the sample in each row, 0 where there is none
        self.num_used = 0
        told = source.format.asked.keys() & {"response", "messages"} and not source.entry.ranking
        self.answers = ROWS[method.rows].answers if method else bool(told)
        self._media = method.reads if method else None
        self._oddities = Oddities(source.format, [word for word in WORDS if word not in source.placeholders], self._media)
        self._columns: set[str] = set()
        self._groups = Groups(source)

    def findings(self, registered: bool) -> Iterator[Finding]:
        """What the whole reading has found, equal findings as one."""
        rate = Rate(f"checking {self.source.name}", "rows", self.size)
        for row in range(self.first, self.first + self.size):
            self._see(row)
            rate.add(1)
        rate.end()
        if registered:
            yield from self._of_columns()
        yield from self._groups.findings()

    def _see(self, row: int) -> None:
        try:
            record = self.source.record(row)
            if isinstance(record, Mapping) and len(self._columns) < _MOST_COLUMNS:
                self._columns.update(record)
            sample = self.source.read(record)
        except BadRecord as error:
            self._groups.add(row, "left out", str(error))
            return
        if reason := unlearnable(sample, self.answers, self._media):
            self._groups.add(row, "left out", reason)
            return
        self.hashes[row - self.first] = fingerprint(sample)
        self.num_used += 1
        table, inner = self.source.find(row)
        for odd in self._oddities.of(record, sample, self.folder or table.told_as.parent):
            self._groups.add(row, "kept", f"{odd.path} {odd.what}".strip(), odd.mend, odd.kind)
        text = table.json_text(inner)
        if text is not None and (key := repeated_key(text)) is not None:
            self._groups.add(row, "kept", f"the key {key!r} stands twice in one object; only the last value is read", "keep one")

    def _of_columns(self) -> Iterator[Finding]:
        """Columns that the registry names in vain."""
        place = f"{FILE}: {self.source.name}.columns"
        for role, column in self.source.format.asked.items():
            if column not in self._columns:
                names = sorted(map(str, self._columns))
                mend = suggestion(column, names).removeprefix("; ") or f"they have {', '.join(map(repr, names[:8]))}"
                yield Finding(f"{place}.{role}", f"column {column!r} is in none of its {self.size:,} records", mend)
        for role, why in self.source.unread_columns().items():
            yield Finding(f"{place}.{role}", why, "take it out, or correct what it is to be read with")

    def place(self, number: int) -> str:
        """The file and the row of the n-th row that was read."""
        file, inner = self.source.file_row(self.first + number)
        return f"{shown_path(file)}:{inner}"


def _of_all(options: DataOptions, seen: Mapping[str, _Pass]) -> Iterator[Finding]:
    """What is told from all data sets together."""
    train = [seen[name] for name in dict.fromkeys(options.dataset) if name in seen]
    others = {name: seen[name] for name in dict.fromkeys(options.eval_dataset) if name in seen}
    if train:
        yield from _repeats([one for one in train if not one.source.sequential], bool(options.val_size))
        learnt = np.concatenate([one.hashes for one in train])
        for one in others.values():
            yield from _overlap(one, train, learnt)
    evals = [[one] for one in others.values()] if options.eval_on_each_dataset else [list(others.values())]
    for key, sets, purpose in (("dataset", [train], "train"), ("eval_dataset", evals, "evaluate")):
        for each in sets:
            if each and not any(one.num_used for one in each):
                yield Finding(key, f"no row is left to {purpose} on", "mend what is told above", "stops the run")


def _repeats(sets: Sequence[_Pass], splits: bool) -> Iterator[Finding]:
    """Rows that say the same as an earlier one."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(one.hashes for one in sets)])
    order = np.argsort(hashes, kind="stable")
    again = (hashes[order[1:]] == hashes[order[:-1]]) & (hashes[order[1:]] != 0)
    places = np.sort(order[1:][again])
    if len(places):
        first = int(np.flatnonzero(hashes == hashes[places[0]])[0])
        rows = [_place(sets, int(place)) for place in places[:NUM_FIRST]]
        mend = "keep one of them, unless it is meant to count more than once"
        mend += "; 'val_size' may put one into training and the other into evaluation" if splits else ""
        yield Finding(rows[0], f"is the same sample as {_place(sets, first)}", mend, "kept", tuple(rows), len(places))


def _overlap(one: _Pass, train: Sequence[_Pass], learnt: NDArray[np.uint64]) -> Iterator[Finding]:
    """Rows that are evaluated and learnt, too."""
    places = np.flatnonzero(np.isin(one.hashes, learnt) & (one.hashes != 0))
    if len(places):
        twin = _place(train, int(np.flatnonzero(learnt == one.hashes[places[0]])[0]))
        rows = [one.place(int(place)) for place in places[:NUM_FIRST]]
        mend = "take it out of one of them: an evaluation on what was learnt says nothing"
        yield Finding(rows[0], f"is evaluated on, and is trained on as {twin}", mend, "kept", tuple(rows), len(places))


def _place(sets: Sequence[_Pass], number: int) -> str:
    """The file and the row of the n-th row of several data sets."""
    for one in sets:
        if number < one.size:
            return one.place(number)
        number -= one.size
    raise IndexError(number)


def fingerprint(sample: Sample) -> int:
    """A hash of all that is learnt or read of a sample, never 0."""
    import xxhash

    parts = [sample.system, sample.tools]
    for message in (*sample.messages, sample.chosen, sample.rejected):
        parts += (message.role, message.thought, message.before_calls, message.content) if message else ("",)
    parts.append(repr((sample.images, sample.videos, sample.audios, sample.desirable)))
    return xxhash.xxh3_64_intdigest("\0".join(parts).encode(errors="surrogatepass")) or 1
