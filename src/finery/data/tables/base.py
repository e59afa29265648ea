"""What a table is: the records of one file, read by number and never all at once."""

import os
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any

from finery.data.content import check_unchanged
from finery.errors import UserError
from finery.files import digest

MARKS = {
    b"\x1f\x8b": "is compressed by gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; let its name end in .zst",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is a parquet file; let its name end in .parquet",
    b"ARROW1": "is an arrow file; let its name end in .arrow",
    b"\xff\xfe": "is text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "is text in UTF-16; save it as UTF-8",
}
"""How files begin that are something else than their name says."""


class Table(ABC):
    """Records of one file. `build` is called once for a content, every process then opens what it has made.

    A table may be used after a fork and be pickled: whatever cannot is opened when it is first used.
    """

    sequential = False  # rows can be had in any order

    def __init__(self, path: Path, made: Path) -> None:
        """`made` is the folder that `build` has filled."""
        self.path = path
        self.made = made
        self.told_as = path  # what messages name: the user's file, of which `path` may be the unpacked content

    @classmethod
    @abstractmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Write into the folder `beside` what reading by number needs; raises `UserError` naming file and line."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> Any:
        """The record of a row; raises `BadRecord` where this row alone is broken."""

    @property
    def content(self) -> str:
        """A digest of the file's bytes."""
        return self.made.name.partition(".")[0]

    def line(self, row: int) -> int | None:
        """The line, from 1, where a row begins; nothing where the file has no lines."""
        return None

    def json_text(self, row: int) -> str | None:
        """The JSON that a row was read from; nothing where it was read from something else."""
        return None


@cache
def layout() -> str:
    """A digest of the code that fills the folders of tables: another version of it never takes what this one has made."""
    return digest(*sorted(Path(__file__).parent.glob("*.py")))[:8]


class Bytes:
    """Pieces of a file by place, opened when first used in a process."""

    def __init__(self, path: Path, content: str | None = None) -> None:
        """With `content`, a digest of the file's bytes, a file that is changed while it is read is noticed."""
        self.path = path
        self.content = content
        self._stamp = _stamp(path.stat())
        self._descriptor: int | None = None

    def read(self, start: int, size: int) -> bytes:
        """So many bytes from `start` on; raises `UserError` where they may not be those that were there at the beginning."""
        found = os.pread(self._open(), size, start)
        self.check()
        return found

    def check(self) -> None:
        """Raise `UserError` where the file is no longer what it was at the beginning."""
        if self.content is not None and (stamp := _stamp(os.fstat(self._open()))) != self._stamp:
            check_unchanged(self.path, self.content)
            self._stamp = stamp

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    """By what a file is taken for unchanged."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def check_head(path: Path, head: bytes) -> None:
    """Raise `UserError` where the first bytes of a text file are those of something else."""
    if not head:
        raise UserError(f"{path} is empty; it should hold records")
    for mark, said in MARKS.items():
        if head.startswith(mark):
            raise UserError(f"{path} {said}")
    if b"\0" in head[:4096]:
        raise UserError(f"{path} is not text: it holds zero bytes; is it the right file?")
