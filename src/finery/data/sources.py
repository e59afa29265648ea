"""A data set of a run: its files, read by row, and each record made a sample."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finery.data.content import identify
from finery.data.detect import detect
from finery.data.files import find_files, local_files, open_table
from finery.data.formats import FORMATS
from finery.data.formats.base import Format
from finery.data.registry import Catalogue, DatasetEntry, unknown_keys
from finery.data.sample import BadRecord, Message, Sample
from finery.data.tables.base import Table
from finery.errors import UserError, suggestion
from finery.log import get_logger

log = get_logger(__name__)

NUM_LOOKED_AT = 100
"""Records from which a format is told, and columns are missed."""


@dataclass
class Source:
    """One data set; rows of all its files are counted through in the order of the files' names."""

    name: str
    entry: DatasetEntry
    tables: list[Table]
    contents: list[str]  # a digest of each file's bytes
    placeholders: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ends = np.cumsum([len(table) for table in self.tables], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @cached_property
    def format(self) -> Format:
        """What reads its records."""
        return FORMATS[self.entry.formatting](self.entry.columns, self.entry.tags, self.entry.ranking)

    def record(self, row: int) -> Any:
        """A record as it is in the file; raises `BadRecord`."""
        table, inner = self._find(row)
        return table[inner]

    def sample(self, row: int) -> Sample:
        """A record as a sample, placeholders filled in; raises `BadRecord`."""
        record = self.record(row)
        if not isinstance(record, Mapping):
            raise BadRecord(f"a record should be an object, found {type(record).__name__}")
        sample = self.format.read(record)
        return fill(sample, self.placeholders) if self.placeholders else sample

    def place(self, row: int) -> str:
        """Where a row stands, for messages: `x.jsonl row 4 (line 6)`, rows counted from 0 in each file."""
        table, inner = self._find(row)
        line = table.line(inner)
        return f"{table.told_as.name} row {inner}" + (f" (line {line})" if line and line != inner + 1 else "")

    def told(self, row: int) -> str:
        """`place` with the data set's name before it."""
        return f"data set {self.name!r}, {self.place(row)}"

    def file_row(self, row: int) -> tuple[Path, int]:
        """The file of a row, and its number there."""
        table, inner = self._find(row)
        return table.told_as, inner

    def _find(self, row: int) -> tuple[Table, int]:
        place = int(np.searchsorted(self.ends, row, side="right")) if len(self.tables) > 1 else 0
        return self.tables[place], row - (int(self.ends[place - 1]) if place else 0)

    def part(self) -> tuple[int, int]:
        """The rows that the entry's `split` names: the first, and how many."""
        inner = re.search(r"\[(-?\d*)(%?):(-?\d*)(%?)\]$", self.entry.split)
        if not inner:
            return 0, len(self)

        def at(number: str, percent: str, default: int) -> int:
            if not number:
                return default
            place = round(len(self) * int(number) / 100) if percent else int(number)
            return min(max(place + len(self) if place < 0 else place, 0), len(self))

        first, last = at(inner[1], inner[2], 0), at(inner[3], inner[4], len(self))
        return first, max(last - first, 0)

    def missing_columns(self) -> Iterator[str]:
        """Columns that the entry names and none of the first records has."""
        named = self.entry.columns.model_dump(exclude_unset=True)
        wanted = [column for role, column in named.items() if column and role in self.format.reads]
        records = [record for row in range(min(len(self), NUM_LOOKED_AT)) if isinstance(record := self._quiet(row), Mapping)]
        found = {key for record in records for key in record}
        for column in wanted:
            if records and column not in found:
                yield f"column {column!r} is in none of its first {len(records)} records{suggestion(column, map(str, found))}"

    def _quiet(self, row: int) -> Any:
        try:
            return self.record(row)
        except BadRecord:
            return None


def open_source(
    name: str,
    catalogue: Catalogue,
    download: Mapping[str, Any],
    placeholders: Mapping[str, str],
    taken: dict[Path, str],
    anew: bool = False,
) -> Source:
    """Find a data set's files, index them where that was not done before, and tell what is odd. Raises `UserError`.

    `taken` gets the files whose content was not read now but remembered.
    """
    entry = catalogue.entry(name)
    if entry is not None:
        for unknown in unknown_keys(catalogue.entries.get(name, {})):
            log.warning("%s: %r in dataset_info.json is read by nothing", name, unknown)
        files = find_files(name, entry, catalogue.folder, download)
    else:
        files = local_files(str(catalogue.path(name)))
    tables = [open_table(file, anew, taken) for file in files]
    contents = [identify(file)[0] for file in files]
    if sum(len(table) for table in tables) == 0:
        raise UserError(f"data set {name!r} holds no records: {', '.join(str(file) for file in files[:3])} is empty")
    if entry is None:
        entry = _detected(name, tables)
    source = Source(name, entry, tables, contents, placeholders)
    for fault in source.missing_columns():
        log.warning("data set %r: %s", name, fault)
    return source


def _detected(name: str, tables: Sequence[Table]) -> DatasetEntry:
    records = []
    for table in tables:
        for row in range(min(len(table), NUM_LOOKED_AT - len(records))):
            try:
                records.append(table[row])
            except BadRecord:
                continue
    try:
        found, said = detect(records)
    except UserError as error:
        raise UserError(*(f"data set {name!r}: {line}" for line in error.complaints)) from None
    log.info("data set %s: %s", name, said)
    return DatasetEntry(file_name=name, **found)


def fill(sample: Sample, words: Mapping[str, str]) -> Sample:
    """Replace `{{word}}` in every text."""

    def text(value: str) -> str:
        if "{{" in value:
            for word, filled in words.items():
                value = value.replace("{{" + word + "}}", filled)
        return value

    def message(one: Message | None) -> Message | None:
        if one is None:
            return None
        return replace(one, content=text(one.content), thought=text(one.thought), before_calls=text(one.before_calls))

    messages = tuple(filled for one in sample.messages if (filled := message(one)))
    return replace(sample, system=text(sample.system), messages=messages, chosen=message(sample.chosen), rejected=message(sample.rejected))
