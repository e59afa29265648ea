"""JSON lines: one JSON value a line, found by an index of where lines begin."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finery.data.content import CHUNK_BYTES, Rate, read_chunks
from finery.data.sample import BadRecord
from finery.data.tables.base import Bytes, Table, check_head

__all__ = ["JSONLines"]

LINES = "lines.npy"
BOM = b"\xef\xbb\xbf"
_BLANK = frozenset(b" \t\r\n")
_SUSPECT_BYTES = 64
"""A blank line that is longer than this is read as a broken record."""


class JSONLines(Table):
    """Lines of a file; blank ones are no records."""

    keeps_blank = False

    def __init__(self, path: Path, made: Path) -> None:
        super().__init__(path, made)
        self.starts: NDArray[np.int64] = np.load(made / "starts.npy", mmap_mode="r")
        self.sizes: NDArray[np.int64] = np.load(made / "sizes.npy", mmap_mode="r")
        self.lines: NDArray[np.int64] | None = np.load(made / LINES, mmap_mode="r") if (made / LINES).exists() else None
        self.bytes = Bytes(path, self.content)

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Index the lines."""
        starts, sizes = index_lines(path)
        kept = np.ones(len(starts), bool) if cls.keeps_blank else _not_blank(path, starts, sizes)
        save_index(beside, starts[kept], sizes[kept], None if kept.all() else np.flatnonzero(kept) + 1)

    def __len__(self) -> int:
        return len(self.starts)

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
        raw = self.bytes.read(int(self.starts[row]), int(self.sizes[row]))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise BadRecord(f"this line is not UTF-8 (byte {error.start}: {raw[error.start]:#x}); save the file as UTF-8") from None

    def json_text(self, row: int) -> str | None:
        """The row's text."""
        return self.text(row)

    def line(self, row: int) -> int | None:
        """As in the file, where blank lines count."""
        return row + 1 if self.lines is None else int(self.lines[row])


def save_index(folder: Path, starts: NDArray[np.int64], sizes: NDArray[np.int64], lines: NDArray[np.int64] | None) -> None:
    """Where records begin, how many bytes they have, and on which lines they begin, unless each is the next."""
    np.save(folder / "starts.npy", starts)
    np.save(folder / "sizes.npy", sizes)
    if lines is not None:
        np.save(folder / LINES, lines)


def index_lines(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each line begins and its size in bytes, without its end."""
    rate = Rate(f"looking for the lines of {path.name}", "bytes", path.stat().st_size)
    breaks, seen, first = [], 0, b""
    for chunk in read_chunks(path, CHUNK_BYTES):
        if not seen:
            check_head(path, chunk[:8192])
            first = chunk[:3]
        breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + seen)
        seen += len(chunk)
        rate.add(len(chunk))
    if not seen:
        check_head(path, b"")
    rate.end()
    ends = np.concatenate([*breaks, np.asarray([seen])]) if breaks[-1].size == 0 or breaks[-1][-1] != seen - 1 else np.concatenate(breaks)
    starts = np.empty(len(ends), np.int64)
    starts[0] = len(BOM) if first == BOM else 0
    starts[1:] = ends[:-1] + 1
    return starts, ends - starts


def _not_blank(path: Path, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which lines hold something. Only short lines are looked at; most files have none."""
    data = Bytes(path)
    short = np.flatnonzero(sizes < _SUSPECT_BYTES)
    if len(short) > len(sizes) // 2:  # a file of short lines: read in order rather than piece by piece
        text = path.read_bytes() if path.stat().st_size < CHUNK_BYTES else None
        blank = [row for row in short if _is_blank(_piece(data, text, int(starts[row]), int(sizes[row])))]
    else:
        blank = [row for row in short if _is_blank(data.read(int(starts[row]), int(sizes[row])))]
    kept = np.ones(len(starts), bool)
    kept[blank] = False
    return kept


def _piece(data: Bytes, text: bytes | None, start: int, size: int) -> bytes:
    return data.read(start, size) if text is None else text[start : start + size]


def _is_blank(raw: bytes) -> bool:
    return all(byte in _BLANK for byte in raw)
