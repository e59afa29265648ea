"""What a run prints: a file that is kept short, and reading it on while that happens.

The run writes to the end of `output.log` by itself, through nobody, so that it neither waits nor breaks where its supervisor has ended.
Each byte has a place that never changes: the first ever written has 0. `output.gone` holds the place of the first byte that `output.log`
still has; what was before it is in `output.log.1`, `output.log.2` and so on, the newest first.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from finery.jobs.queue import lock

LIMIT_BYTES = 10 << 20
NUM_KEPT = 5
_CHUNK_BYTES = 1 << 16
_TAIL_BYTES = 1 << 18
_FALLOC_FL_COLLAPSE_RANGE = 8  # of Linux's falloc.h


class Piece(NamedTuple):
    """Some of what was printed, and the place of its first byte."""

    place: int
    data: bytes


class Output:
    """The output of the job in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "output.log"
        self._gone = folder / "output.gone"

    def create(self) -> None:
        """Begin it."""
        self._gone.write_text(f"{0:020}", encoding="utf-8")
        self.path.touch(0o600)

    def open(self) -> int:
        """A file to write to: whatever else is done with it, each write goes to its end."""
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def rotate(self, limit_bytes: int = LIMIT_BYTES, num_kept: int = NUM_KEPT) -> bool:
        """Move what was written into `output.log.1` where it is more than the limit; the oldest file is dropped."""
        if self.path.stat().st_size <= limit_bytes:
            return False
        file, log = os.open(self._gone, os.O_RDWR), os.open(self.path, os.O_RDWR)
        try:
            if not lock(file):  # somebody reads; the next time will do
                return False
            new = self.path.with_name("output.log.new")
            copy = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                size_bytes = _take_head(log, copy, lambda: self._shift(new, num_kept))
            finally:
                os.close(copy)
            os.pwrite(file, f"{int(os.pread(file, 20, 0)) + size_bytes:020}".encode(), 0)
        finally:
            os.close(log)
            os.close(file)
        return True

    def _shift(self, new: Path, num_kept: int) -> None:
        for number in range(num_kept - 1, 0, -1):
            if (older := self._older(number)).exists():
                older.replace(self._older(number + 1))
        new.replace(self._older(1))

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"output.log.{number}")

    @contextmanager
    def _still(self) -> Iterator[list[tuple[int, int, Path]]]:
        """The files with the places of their first byte and of the one after their last, newest first; nothing moves meanwhile."""
        file = os.open(self._gone, os.O_RDONLY)
        try:
            lock(file, shared=True, wait=True)
            start = int(os.pread(file, 20, 0))
            pieces = [(start, start + self.path.stat().st_size, self.path)]
            while (older := self._older(len(pieces))).exists():
                pieces.append((start - older.stat().st_size, start, older))
                start = pieces[-1][0]
            yield pieces
        finally:
            os.close(file)

    def first(self) -> int:
        """The place of the first byte that is kept."""
        with self._still() as pieces:
            return pieces[-1][0]

    def read(self, place: int) -> Piece:
        """Some bytes from a place on; they begin later where that place is no longer kept."""
        with self._still() as pieces:
            place = max(place, pieces[-1][0])
            start, end, path = next(piece for piece in pieces if piece[0] <= place)
            with path.open("rb") as file:
                file.seek(place - start)
                return Piece(place, file.read(min(end - place, _CHUNK_BYTES)))

    def tail(self, num_lines: int) -> int:
        """The place where the last lines begin."""
        with self._still() as pieces:
            end = pieces[0][1]
            start = place = max(pieces[-1][0], end - _TAIL_BYTES)
        text = b""
        while place < end:
            piece = self.read(place)
            text, place = text + piece.data, piece.place + len(piece.data)
        breaks = [number for number, letter in enumerate(text) if letter == 10 and number < len(text) - 1]
        if num_lines <= 0:
            return end
        return start + breaks[-num_lines] + 1 if len(breaks) >= num_lines else start


def _take_head(log: int, copy: int, keep: Callable[[], None]) -> int:
    """Copy what stands in `log`, `keep` the copy, then take it out of `log`, to which others go on writing; returns how many bytes.

    ext4 and XFS can cut whole blocks off the beginning of a file, and nothing can be lost. Elsewhere the file is emptied: what is written
    in the microseconds between the last look and that would be lost.
    """
    block_bytes = os.fstatvfs(log).f_bsize
    size_bytes = _copy(log, copy, 0, (os.fstat(log).st_size - 1) // block_bytes * block_bytes)
    keep()
    if not _cut(log, size_bytes):
        size_bytes += _copy(log, copy, size_bytes, sys.maxsize)
        os.ftruncate(log, 0)
    return size_bytes


def _copy(source: int, target: int, start: int, end: int) -> int:
    place = start
    while place < end and (piece := os.pread(source, min(end - place, 1 << 20), place)):
        place += os.write(target, piece)
    return place - start


def _cut(file: int, size_bytes: int) -> bool:
    """Cut bytes off the beginning of a file; returns whether its file system knows how to."""
    if sys.platform != "linux" or not size_bytes:
        return False
    whole = (file, _FALLOC_FL_COLLAPSE_RANGE, ctypes.c_longlong(0), ctypes.c_longlong(size_bytes))
    return ctypes.CDLL(None).fallocate(*whole) == 0
