"""Data sets of any size for the measurements: the packaged demo rows, each time a little different."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finery.data.registry import PACKAGED

FOLDER = Path(os.environ.get("FINERY_SHARED", "/nowhere")) / "data"
"""Larger sets of the same names, where there are some; else the packaged ones."""


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Alpaca rows in English and Chinese, numbered so that none is the same as another; some 700 bytes each."""
    base: list[dict[str, Any]] = []
    for name in ("alpaca_en_demo", "alpaca_zh_demo"):
        base += json.loads(((FOLDER if FOLDER.is_dir() else PACKAGED) / f"{name}.json").read_text(encoding="utf-8"))
    joined = 1 if FOLDER.is_dir() else 3  # the packaged rows are short
    for number in range(count):
        row = base[number % len(base)]
        answer = "\n".join(base[(number + k * 7) % len(base)]["output"] for k in range(joined))
        yield {"instruction": f"{row['instruction']} ({number})", "input": row["input"], "output": answer}


def write(folder: Path, count: int, kind: str = "jsonl") -> Path:
    """A file of so many rows as jsonl, json, parquet or arrow, unless it is there; returns its path."""
    path = folder / f"rows_{count}.{kind}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    if kind in ("jsonl", "json"):
        with beside.open("w", encoding="utf-8") as file:
            file.write("[" if kind == "json" else "")
            for number, row in enumerate(rows(count)):
                file.write(
                    (",\n" if kind == "json" and number else "") + json.dumps(row, ensure_ascii=False) + ("\n" if kind == "jsonl" else "")
                )
            file.write("]" if kind == "json" else "")
    else:
        _write_table(beside, count, kind)
    beside.replace(path)
    return path


def _write_table(path: Path, count: int, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def batches() -> Iterator[pa.RecordBatch]:
        held: list[dict[str, Any]] = []
        for row in rows(count):
            held.append({name: row.get(name, "") for name in ("instruction", "input", "output")})
            if len(held) == 1000:
                yield pa.RecordBatch.from_pylist(held)
                held = []
        if held:
            yield pa.RecordBatch.from_pylist(held)

    schema = pa.schema([(name, pa.string()) for name in ("instruction", "input", "output")])
    if kind == "parquet":
        with parquet.ParquetWriter(path, schema) as out:
            for batch in batches():
                out.write_batch(batch)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
            for batch in batches():
                out.write_batch(batch)
