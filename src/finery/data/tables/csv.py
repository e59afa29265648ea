"""Comma-separated values: converted once to JSON lines, since a row may go over several lines."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from finery.data.content import Rate, read_chunks
from finery.data.sample import BadRecord
from finery.data.tables.base import Bytes, check_head
from finery.data.tables.jsonl import JSONLines, write_index
from finery.errors import UserError

__all__ = ["CSV"]

RECORDS = "records.jsonl"
_BAD = b"!"
"""A converted line that begins so tells why its row is none."""


class CSV(JSONLines):
    """Every cell is text, as written: `NA` and `42` are answers, too; an empty cell is nothing."""

    def __init__(self, path: Path, made: Path) -> None:
        super().__init__(path, made)
        self.bytes = Bytes(made / RECORDS)

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Convert; nothing but the header and one row is held at a time."""
        check_head(path, next(read_chunks(path, 8192), b""))
        with (beside / RECORDS).open("wb") as out:
            write_index(beside, _converted(path, out))

    def __getitem__(self, row: int) -> Any:
        text = self.text(row)
        if text.startswith("!"):
            raise BadRecord(text[1:])
        return json.loads(text)


def _converted(path: Path, out: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Write each row as a line; where it begins, how many bytes it has, and its first line in the user's file."""
    rate, at = Rate(f"reading {path.name}", "rows"), 0
    for line, written in _rows(path):
        out.write(written + b"\n")
        yield at, len(written), line
        at += len(written) + 1
        rate.add(1)
    rate.end()


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """The first line of each row, and the row as a JSON object, or `!` and what is wrong with it."""
    csv.field_size_limit(1 << 30)
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if twice := {name for name in header if name and header.count(name) > 1}:
                raise UserError(f"{path}:1: the header names {', '.join(sorted(map(repr, twice)))} twice")
            line = reader.line_num + 1
            for cells in reader:
                if len(cells) > len(header):
                    yield line, _BAD + f"the row has {len(cells)} cells where the header has {len(header)}".encode()
                elif cells:  # a blank line is no row
                    record = {name: cell or None for name, cell in zip(header, cells, strict=False) if name}
                    yield line, json.dumps(record | dict.fromkeys(filter(None, header[len(cells) :])), ensure_ascii=False).encode()
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (after line {line}: byte {error.object[error.start]:#x}); save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}:{line}: this is not CSV: {error}") from None
