"""Parquet: converted once to Arrow, since a compressed column cannot be read by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finery.data.content import Rate
from finery.data.tables.arrow import Arrow
from finery.errors import UserError

__all__ = ["Parquet"]

ROWS = "rows.arrow"
_BATCH_ROWS = 512


class Parquet(Arrow):
    """Rows of a parquet file."""

    @property
    def file(self) -> Path:
        """The converted file."""
        return self.made / ROWS

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Convert, a few hundred rows at a time."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        sizes = []
        try:
            file = parquet.ParquetFile(path, pre_buffer=False)
            rate = Rate(f"unpacking {path.name}", "rows", file.metadata.num_rows)
            with pa.ipc.new_file(str(beside / ROWS), file.schema_arrow) as out:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    out.write_batch(batch)
                    sizes.append(batch.num_rows)
                    rate.add(batch.num_rows)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as a parquet file: {str(error).splitlines()[0]}") from None
        rate.end()
        np.save(beside / "ends.npy", np.cumsum(sizes, dtype=np.int64))
