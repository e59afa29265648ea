"""Arrow files, as `datasets` writes them: mapped into memory, a batch of rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finery.data.tables.base import Table
from finery.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Arrow"]

_REMAP_AFTER = 20_000
"""So many rows are read until the file is mapped anew: pages that were read count as this process's memory until then."""


class Arrow(Table):
    """Rows of a stream or a file in Arrow's IPC format."""

    def __init__(self, path: Path, made: Path) -> None:
        super().__init__(path, made)
        self.ends = np.load(made / "ends.npy")
        self._batches: Any = None
        self._read = 0

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Count the rows of each batch."""
        batches = open_batches(path)
        np.save(beside / "ends.npy", np.cumsum([batch.num_rows for batch in batches], dtype=np.int64))

    @property
    def file(self) -> Path:
        """What is mapped."""
        return self.path

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, row: int) -> Any:
        if self._batches is None or self._read >= _REMAP_AFTER:
            self._batches, self._read = open_batches(self.file), 0
        self._read += 1
        place = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[place - 1]) if place else 0
        return self._batches[place].slice(row - first, 1).to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batches": None, "_read": 0}


def open_batches(path: Path) -> list[pa.RecordBatch]:
    """The record batches of a file; nothing but their places is read."""
    import pyarrow as pa

    try:
        mapped = pa.memory_map(str(path))
        try:
            file = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:  # not the file format: `datasets` writes the stream format
            mapped.seek(0)
            return pa.ipc.open_stream(mapped).read_all().to_batches()
        return [file.get_batch(place) for place in range(file.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as an arrow file: {str(error).splitlines()[0]}") from None
