"""Arrow files, as `datasets` writes them: mapped into memory, a batch of rows at a time."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finery.data.tables.base import Bytes, Table
from finery.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Arrow"]

_KEPT_ROWS = 500
"""After so many rows the pages that they lay on are let go: until then they count as this process's memory."""


class Arrow(Table):
    """Rows of a stream or a file in Arrow's IPC format."""

    def __init__(self, path: Path, made: Path) -> None:
        super().__init__(path, made)
        self.ends = np.load(made / "ends.npy")
        self._mapped: Mapped | None = None
        self._bytes = Bytes(path, self.content)

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Count the rows of each batch."""
        batches = Mapped.open(path).batches
        np.save(beside / "ends.npy", np.cumsum([batch.num_rows for batch in batches], dtype=np.int64))

    @property
    def file(self) -> Path:
        """What is mapped."""
        return self.path

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, row: int) -> Any:
        if self._mapped is None:
            self._mapped = Mapped.open(self.file)
        place, inner = self.find(row)
        if self.file != self.path:
            return self._mapped.row(place, inner)
        self._bytes.check()  # what is mapped changes with the file, and ends where that is cut short
        found = self._mapped.row(place, inner)
        self._bytes.check()
        return found

    def find(self, row: int) -> tuple[int, int]:
        """The batch of a row, and its number there."""
        place = int(np.searchsorted(self.ends, row, side="right"))
        return place, row - (int(self.ends[place - 1]) if place else 0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}


@dataclass
class Mapped:
    """A file's record batches; nothing but their places is read when it is opened."""

    memory: mmap.mmap
    batches: list[pa.RecordBatch]
    num_read: int = 0

    @classmethod
    def open(cls, path: Path) -> Mapped:
        """Map a file; raises `UserError` where it is no arrow file."""
        import pyarrow as pa

        try:
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            whole = pa.BufferReader(pa.py_buffer(memory))
            try:
                inner = pa.ipc.open_file(whole)
            except pa.ArrowInvalid:  # not the file format: `datasets` writes the stream format
                whole.seek(0)
                return cls(memory, pa.ipc.open_stream(whole).read_all().to_batches())
            return cls(memory, [inner.get_batch(place) for place in range(inner.num_record_batches)])
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as an arrow file: {str(error).splitlines()[0]}") from None

    def row(self, place: int, inner: int) -> Any:
        """One row of a batch, as Python's own values."""
        self.num_read += 1
        if self.num_read % _KEPT_ROWS == 0:
            self.memory.madvise(mmap.MADV_DONTNEED)
        return self.batches[place].slice(inner, 1).to_pylist()[0]
