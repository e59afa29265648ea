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
from finery.data.formats.base import Format, kind_of
from finery.data.registry import Catalogue, DatasetEntry, unknown_keys
from finery.data.sample import BadRecord, Message, Sample
from finery.data.streams import stream_table
from finery.data.tables.base import Table
from finery.errors import UserError, suggestion
from finery.log import get_logger

log = get_logger(__name__)

NUM_LOOKED_AT = 100
"""Records from which a format is told, and columns are missed."""
WORDS = ("name", "author")
"""What well-known data sets leave to be filled in by `placeholders`."""


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

    @property
    def sequential(self) -> bool:
        """Whether its rows can only be read one after the other."""
        return any(table.sequential for table in self.tables)

    @cached_property
    def format(self) -> Format:
        """What reads its records."""
        return FORMATS[self.entry.formatting](self.entry.columns, self.entry.tags, self.entry.ranking)

    def record(self, row: int) -> Any:
        """A record as it is in the file; raises `BadRecord`."""
        table, inner = self.find(row)
        return table[inner]

    def sample(self, row: int) -> Sample:
        """A record as a sample, placeholders filled in; raises `BadRecord`."""
        return self.read(self.record(row))

    def read(self, record: Any) -> Sample:
        """What `sample` makes of a record."""
        if not isinstance(record, Mapping):
            raise BadRecord(f"a record should be an object, found {kind_of(record)}")
        sample = self.format.read(record)
        return fill(sample, self.placeholders) if self.placeholders else sample

    def place(self, row: int) -> str:
        """Where a row stands, for messages: `x.jsonl row 4 (line 6)`, rows counted from 0 in each file."""
        table, inner = self.find(row)
        line = table.line(inner)
        return f"{table.told_as.name} row {inner}" + (f" (line {line})" if line and line != inner + 1 else "")

    def told(self, row: int) -> str:
        """`place` with the data set's name before it."""
        return f"data set {self.name!r}, {self.place(row)}"

    def file_row(self, row: int) -> tuple[Path, int]:
        """The file of a row, and its number there."""
        table, inner = self.find(row)
        return table.told_as, inner

    def find(self, row: int) -> tuple[Table, int]:
        """The table of a row, and its number there."""
        place = int(np.searchsorted(self.ends, row, side="right")) if len(self.tables) > 1 else 0
        return self.tables[place], row - (int(self.ends[place - 1]) if place else 0)

    def part(self) -> tuple[int, int]:
        """The rows that the entry's `split` names: the first, and how many."""
        inner = re.search(r"\[(-?\d*)(%?):(-?\d*)(%?)\]$", self.entry.split)
        if not inner:
            return 0, len(self)

        percent = bool(inner[2] or inner[4])  # of both ends, as `datasets` reads it

        def at(number: str, default: int) -> int:
            if not number:
                return default
            place = round(len(self) * int(number) / 100) if percent else int(number)
            return min(max(place + len(self) if place < 0 else place, 0), len(self))

        first, last = at(inner[1], 0), at(inner[3], len(self))
        return first, max(last - first, 0)

    def doubts(self) -> Iterator[str]:
        """What is odd about the entry and the first records: columns that are not there or that nothing reads, words to fill in."""
        records = [record for row in range(min(len(self), NUM_LOOKED_AT)) if isinstance(record := self._quiet(row), Mapping)]
        found = {str(key) for record in records for key in record}
        for column in self.format.asked.values():
            if records and column not in found:
                yield f"column {column!r} is in none of its first {len(records)} records{suggestion(column, found)}"
        yield from self.unread_columns().values()
        if self.format.columns.tools is None and any(record.get("tools") for record in records):
            yield "its records have a column 'tools' that is not read; name it as 'tools' in the columns of dataset_info.json"
        for word in WORDS:
            if word not in self.placeholders and any(f"{{{{{word}}}}}" in str(record) for record in records):
                yield f"samples still say {{{{{word}}}}}; set 'placeholders.{word}' to fill it in"

    def unread_columns(self) -> dict[str, str]:
        """Roles for which the entry names a column in vain, and how to say so."""
        told = {}
        for role, column in self.format.unread.items():
            reader = "ranking: false" if role in self.format.reads else f"formatting: {self.entry.formatting}"
            told[role] = f"column {column!r} is named as {role!r}, which {reader!r} does not read"
        return told

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
    tells: bool = True,
) -> Source:
    """Find a data set's files, index them where that was not done before, and, if it `tells`, say what is odd. Raises `UserError`.

    `taken` gets the files whose content was not read now but remembered.
    """
    entry = catalogue.entry(name)
    for unknown in unknown_keys(catalogue.entries.get(name, {})) if entry is not None else ():
        log.warning("%s: %r in dataset_info.json is read by nothing", name, unknown)
    if entry is not None and entry.hub and catalogue.stream is not None:
        stream = stream_table(name, entry, catalogue.stream, download)
        tables: list[Table] = [stream]
        contents = [stream.content]
    else:
        files = local_files(str(catalogue.path(name))) if entry is None else find_files(name, entry, catalogue.folder, download)
        tables = [open_table(file, anew, taken) for file in files]
        contents = [identify(file)[0] for file in files]
    if sum(len(table) for table in tables) == 0:
        raise UserError(f"data set {name!r} holds no records: {', '.join(str(table.told_as) for table in tables[:3])} is empty")
    if entry is None or (catalogue.online and name not in catalogue.entries):
        entry = _detected(name, tables, entry)
    source = Source(name, entry, tables, contents, placeholders)
    for doubt in source.doubts() if tells else ():
        log.warning("data set %r: %s", name, doubt)
    return source


def _detected(name: str, tables: Sequence[Table], entry: DatasetEntry | None) -> DatasetEntry:
    """What the first records look like, beside what is known already."""
    records, broken = [], ""
    for table in tables:
        for row in range(min(len(table), NUM_LOOKED_AT - len(records))):
            try:
                records.append(table[row])
            except BadRecord as error:
                broken = broken or f"{table.told_as.name} row {row}: {error}"
    if not records:
        raise UserError(f"data set {name!r}: none of its first records can be read: {broken}")
    try:
        found, said = detect(records)
    except UserError as error:
        raise UserError(*(f"data set {name!r}: {line}" for line in error.complaints)) from None
    log.info("data set %s: %s", name, said)
    known = entry.model_dump(exclude_unset=True) if entry is not None else {"file_name": name}
    return DatasetEntry.model_validate({**known, **found})


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
