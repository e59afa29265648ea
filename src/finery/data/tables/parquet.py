"""Parquet: unpacked to Arrow, since a compressed column cannot be read by row.

Where groups of rows are small, each is unpacked when one of its rows is first asked for.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finery.data.content import Rate, check_unchanged, full_disk
from finery.data.tables.arrow import Arrow, Mapped
from finery.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet as parquet

__all__ = ["Parquet"]

ROWS, GROUPS = "rows.arrow", "groups"
_BATCH_ROWS = 512
_MOST_GROUP_ROWS = 20_000
_MOST_GROUPS = 20_000
"""A file with larger groups, or with more of them, is unpacked as a whole when it is first seen."""
_MOST_MAPPED = 4


class Parquet(Arrow):
    """Rows of a parquet file."""

    def __init__(self, path: Path, made: Path) -> None:
        super().__init__(path, made)
        self.in_groups = (made / GROUPS).is_dir()
        self._groups: OrderedDict[int, Mapped] = OrderedDict()
        self._opened: parquet.ParquetFile | None = None

    @property
    def file(self) -> Path:
        """The unpacked file."""
        return self.made / ROWS

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Note the groups, or unpack all of them, a few thousand rows at a time."""
        import pyarrow as pa

        file = open_parquet(path)
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        if len(sizes) <= _MOST_GROUPS and max(sizes, default=0) <= _MOST_GROUP_ROWS:
            (beside / GROUPS).mkdir()
        else:
            try:
                sizes = list(_unpack_all(file, path, beside / ROWS))
            except (pa.ArrowException, OSError) as error:
                raise fault(path, error) from None
        np.save(beside / "ends.npy", np.cumsum(sizes, dtype=np.int64))

    def __getitem__(self, row: int) -> Any:
        if not self.in_groups:
            return super().__getitem__(row)
        group, inner = self.find(row)
        return self._group(group).row(inner // _BATCH_ROWS, inner % _BATCH_ROWS)

    def _group(self, number: int) -> Mapped:
        """A group's rows, unpacked when one of them is first asked for."""
        if number not in self._groups:
            path = self.made / GROUPS / f"{number}.arrow"
            if not path.exists():
                self._unpack(number, path)
            self._groups[number] = Mapped.open(path)
            if len(self._groups) > _MOST_MAPPED:
                self._groups.popitem(last=False)
        self._groups.move_to_end(number)
        return self._groups[number]

    def _unpack(self, number: int, path: Path) -> None:
        import pyarrow as pa

        if self._opened is None:
            self._opened = open_parquet(self.path)
        beside = path.with_suffix(f".{os.getpid()}")
        try:
            table = self._opened.read_row_group(number, use_threads=False)
            with pa.ipc.new_file(str(beside), table.schema) as out:
                for start in range(0, table.num_rows, _BATCH_ROWS):  # every batch but the last has as many rows as is counted on
                    (batch,) = table.slice(start, _BATCH_ROWS).combine_chunks().to_batches()
                    out.write_batch(batch)
            check_unchanged(self.told_as, self.content)
            beside.replace(path)
        except (pa.ArrowException, OSError) as error:
            raise fault(self.told_as, error) from None
        finally:
            beside.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_groups": OrderedDict(), "_opened": None}


def _unpack_all(file: parquet.ParquetFile, path: Path, target: Path) -> Iterator[int]:
    """Write all rows as arrow, a few thousand at a time; gives the rows of each batch."""
    import pyarrow as pa

    rate = Rate(f"unpacking {path.name}", "rows", file.metadata.num_rows)
    with pa.ipc.new_file(str(target), file.schema_arrow) as out:
        for batch in file.iter_batches(batch_size=16 * _BATCH_ROWS, use_threads=False):
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                out.write_batch(batch.slice(start, _BATCH_ROWS))
                yield min(_BATCH_ROWS, batch.num_rows - start)
            rate.add(batch.num_rows)
    rate.end()


def open_parquet(path: Path) -> parquet.ParquetFile:
    """Open a file; raises `UserError` where it is none of this kind."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise fault(path, error) from None


def fault(path: Path, error: BaseException) -> UserError:
    """The complaint about a file, or about the disk that it is unpacked to."""
    full = full_disk(error) if isinstance(error, OSError) else None
    return full or UserError(f"{path} cannot be read as a parquet file: {str(error).splitlines()[0]}")
