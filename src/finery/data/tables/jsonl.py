"""JSON lines: one JSON value a line, found by an index of where lines begin."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finery.data.content import CHUNK_BYTES, Rate, read_chunks
from finery.data.mapped import MappedArray
from finery.data.sample import BadRecord
from finery.data.tables.base import Bytes, Table, check_head

__all__ = ["JSONLines"]

INDEX = "index.bin"
BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_SUSPECT_BYTES = 64
"""A blank line that is longer than this is read as a broken record."""
_HELD_ROWS = 1 << 16
_KEPT_ROWS = 200
"""After so many rows the pages of the index are let go: until then they count as this process's memory, some 64 kB for each look."""


class JSONLines(Table):
    """Lines of a file; blank ones are no records."""

    keeps_blank = False

    def __init__(self, path: Path, made: Path) -> None:
        super().__init__(path, made)
        self._index = MappedArray(made / INDEX, np.dtype(np.int64), (made / INDEX).stat().st_size // 8)
        self._num_read = 0
        self.bytes = Bytes(path, self.content)

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Index the lines."""
        with (beside / INDEX).open("wb") as out:
            for chunk, offset, found in _lines(path):
                out.write((found if cls.keeps_blank else found[_holds_something(path, chunk, offset, found)]).tobytes())

    def __len__(self) -> int:
        return self._index.size // 3

    @property
    def index(self) -> NDArray[np.int64]:
        """(N, 3): the byte where a record begins, how many it has, and its line from 1."""
        return self._index.array.reshape(-1, 3)

    def __getitem__(self, row: int) -> Any:
        text = self.text(row)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise BadRecord(f"this line is not JSON: {error.msg} (column {error.colno})") from None
        except ValueError as error:  # a number of thousands of digits
            raise BadRecord(f"this line is not JSON that can be read: {error}") from None
        except RecursionError:
            raise BadRecord("this line nests its values too deeply to be read") from None

    def text(self, row: int) -> str:
        """A row's text; raises `BadRecord` where it is not UTF-8."""
        start, size, _ = self.index[row].tolist()
        self._num_read += 1
        if self._num_read % _KEPT_ROWS == 0:
            self._index.let_go()
        raw = self.bytes.read(start, size)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise BadRecord(f"the record is not UTF-8 (byte {error.start}: {raw[error.start]:#x}); save the file as UTF-8") from None

    def json_text(self, row: int) -> str | None:
        """The row's text."""
        return self.text(row)

    def line(self, row: int) -> int | None:
        """As in the file, where blank lines count."""
        return int(self.index[row, 2])


def write_index(folder: Path, records: Iterable[tuple[int, int, int]]) -> None:
    """Where each record begins, how many bytes it has, and its line; a few of them are held at a time."""
    rows = iter(records)
    with (folder / INDEX).open("wb") as out:
        while held := list(islice(rows, _HELD_ROWS)):
            out.write(np.asarray(held, np.int64).tobytes())


def _lines(path: Path) -> Iterator[tuple[bytes, int, NDArray[np.int64]]]:
    """Pieces of a file, where each begins, and the lines (N, 3) that end in it, without their ends; the last line may have none."""
    rate = Rate(f"looking for the lines of {path.name}", "bytes", path.stat().st_size)
    seen = begin = 0
    line = 1
    for chunk in read_chunks(path, CHUNK_BYTES):
        if not seen:
            check_head(path, chunk[:8192])
            begin = len(BOM) if chunk.startswith(BOM) else 0
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + seen
        if len(ends):
            starts = np.concatenate([[begin], ends[:-1] + 1])
            yield chunk, seen, np.stack([starts, ends - starts, np.arange(line, line + len(ends))], axis=1)
            begin, line = int(ends[-1]) + 1, line + len(ends)
        seen += len(chunk)
        rate.add(len(chunk))
    if not seen:
        check_head(path, b"")
    rate.end()
    if begin < seen:
        yield b"", seen, np.asarray([[begin, seen - begin, line]], np.int64)


def _holds_something(path: Path, chunk: bytes, offset: int, lines: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which lines are not blank. Only short ones are looked at."""
    kept = np.ones(len(lines), bool)
    for row in np.flatnonzero(lines[:, 1] < _SUSPECT_BYTES).tolist():
        start, size, _ = lines[row].tolist()
        # one that began in the piece before is read again
        raw = chunk[start - offset : start - offset + size] if offset <= start < offset + len(chunk) else Bytes(path).read(start, size)
        kept[row] = bool(raw.strip(_BLANK))
    return kept
