"""A JSON list: its records stay where they are in the file, and an index says where each begins."""

import json
from collections.abc import Iterator
from pathlib import Path

from finery.data.content import Rate, read_chunks
from finery.data.tables.base import check_head
from finery.data.tables.jsonl import BOM, JSONLines, write_index
from finery.errors import UserError

__all__ = ["JSONList"]

_DECODER = json.JSONDecoder(parse_int=str)  # only the ends of values count here, and Python reads no number of thousands of digits
_SPACE = " \t\r\n"
_WINDOW_BYTES = 1 << 22
_MOST_BYTES = 1 << 28
"""A record that is longer than this is taken for a broken list."""


class JSONList(JSONLines):
    """The values of one list; the file is read in pieces, whatever its size."""

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Index the values of the list."""
        write_index(beside, _values(path))


def _values(path: Path) -> Iterator[tuple[int, int, int]]:
    """Where each value of the list begins, how many bytes it has, and the line where it begins.

    The text is read as Latin-1, so that a character is a byte: all that gives JSON its structure is ASCII, and UTF-8
    uses no ASCII byte for anything else.
    """
    text = _Window(path)
    at = text.skip(0)
    if text.character(at) != "[":
        raise UserError(f"{path} should hold a list of records")
    at = text.skip(at + 1)
    empty = text.character(at) == "]"
    while not empty:
        if not text.character(at):
            raise text.fault(at, "the file ends within the list")
        end = text.value(at)
        yield text.offset + at, end - at, text.line(at)
        at = text.skip(end)
        found = text.character(at)
        if found not in (",", "]"):
            raise text.fault(at, "a comma or the end of the list is due" if found else "the file ends within the list")
        if found == "]":
            break
        at = text.forget(text.skip(at + 1))
        if text.character(at) == "]":
            raise text.fault(at, "a comma stands before the end of the list")
    rest = text.skip(at + 1)
    if text.character(rest):
        raise text.fault(rest, "something follows after the end of the list")
    text.rate.end()


class _Window:
    """The part of a file's text that is looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chunks = read_chunks(path, _WINDOW_BYTES)
        self.rate = Rate(f"looking for the records of {path.name}", "bytes", path.stat().st_size)
        head = next(self.chunks, b"")
        check_head(path, head[:8192])
        self.offset = len(BOM) if head.startswith(BOM) else 0
        self.text = head[self.offset :].decode("latin-1")
        self.lines = 1  # up to the place `counted`
        self.counted = 0
        self.rate.add(len(head))

    def more(self) -> bool:
        """Read on; false at the end of the file."""
        chunk = next(self.chunks, b"")
        self.text += chunk.decode("latin-1")
        self.rate.add(len(chunk))
        return bool(chunk)

    def character(self, at: int) -> str:
        """One character, or nothing at the end."""
        return self.text[at : at + 1]

    def skip(self, at: int) -> int:
        """The next place that is no space."""
        while True:
            while at < len(self.text) and self.text[at] in _SPACE:
                at += 1
            if at < len(self.text) or not self.more():
                return at

    def value(self, at: int) -> int:
        """Where the value that begins at `at` ends."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, at)
                if end + 2 < len(self.text) or not self.more():
                    return end  # what stands at the end of the window may go on, such as 1 before .5 or e-7
            except json.JSONDecodeError as error:
                if not self._read_on(at):
                    ends = (error.pos >= len(self.text.rstrip()) or error.msg.startswith("Unterminated string")) and not self.more()
                    raise self.fault(error.pos, "the file ends within a record" if ends else error.msg) from None
            except RecursionError:
                raise self.fault(at, "values are nested too deeply") from None

    def _read_on(self, at: int) -> bool:
        """As much again as is held from `at` on, so that a long record is not read again and again; false where there is no more."""
        held = len(self.text) - at
        while held < _MOST_BYTES and len(self.text) - at < 2 * held and self.more():
            pass
        return len(self.text) - at > held

    def forget(self, at: int) -> int:
        """Drop what is done with, now and then; returns where `at` is then."""
        if at < _WINDOW_BYTES:
            return at
        self.line(at)
        self.text = self.text[at:]
        self.offset += at
        self.counted = 0
        return 0

    def line(self, at: int) -> int:
        """The line of a place, which is not before the last one asked for."""
        self.lines += self.text.count("\n", self.counted, at)
        self.counted = at
        return self.lines

    def fault(self, at: int, said: str) -> UserError:
        """The complaint about a place."""
        return UserError(f"{self.path}:{self.line(min(at, len(self.text)))}: this is not JSON: {said}")
