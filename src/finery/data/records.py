"""Files become records: one dict per row."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from finery.data.registry import DatasetEntry
from finery.errors import UserError

ENDINGS = (".json", ".jsonl", ".txt", ".csv", ".parquet", ".arrow")
METADATA = ("dataset_info.json", "dataset_infos.json")
"""Files beside the records that hold none."""


def read_records(path: Path, entry: DatasetEntry, limit: int | None) -> list[Any]:
    """The first `limit` records of a file, or of all files directly in a folder, in the order of their names.

    Raises `UserError` naming file and line where a file cannot be read.
    """
    records: list[Any] = []
    for file in _files(path, entry):
        wanted = None if limit is None else limit - len(records)
        if wanted == 0:
            break
        records += _read(file)[:wanted]
    return records


def _files(path: Path, entry: DatasetEntry) -> list[Path]:
    if path.is_file():
        found = [path]
    else:
        inner = path / entry.folder if entry.folder else path
        found = [file for file in sorted(inner.glob("*")) if file.suffix in ENDINGS and file.name not in METADATA]
        if entry.hub:
            # hubs name the files of a split; where no name says so, every file belongs to it
            found = found or [file for file in sorted(inner.rglob("*")) if file.suffix in ENDINGS and file.name not in METADATA]
            of_split = [
                file
                for file in found
                if re.search(rf"(^|[^a-z0-9]){re.escape(entry.split)}([^a-z0-9]|$)", str(file.relative_to(inner)), re.I)
            ]
            if found and not of_split and entry.split != "train":
                raise UserError(f"no file in {inner} is named for the split {entry.split!r}")
            found = of_split or found
    if not found:
        raise UserError(f"{path} holds no file that ends in {', '.join(ENDINGS)}")
    if strange := [file for file in found if file.suffix not in ENDINGS]:
        raise UserError(f"{strange[0]} should end in one of {', '.join(ENDINGS)}")
    return found


def _read(path: Path) -> list[Any]:
    if path.suffix in (".parquet", ".arrow"):
        return _read_table(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if path.suffix == ".txt":
        return [{"text": line} for line in text.removesuffix("\n").split("\n")] if text else []
    return _read_csv(text) if path.suffix == ".csv" else _read_json(path, text)


def _read_table(path: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        from datasets import Dataset

        return Dataset.from_file(str(path)).to_list()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as a {path.suffix[1:]} file: {str(error).splitlines()[0]}") from None


def _read_csv(text: str) -> list[Any]:
    """Every cell is text, as written: `NA` and `42` are answers, too; an empty cell is nothing."""
    csv.field_size_limit(1 << 30)
    return [{name: cell or None for name, cell in row.items() if name} for row in csv.DictReader(io.StringIO(text, newline=""))]


def _read_json(path: Path, text: str) -> list[Any]:
    """A JSON list, or one JSON value a line; `.json` and `.jsonl` may hold either."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: this is not JSON: {error.msg}") from None
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(), which also cuts at U+2028 inside a text
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: this line is not JSON: {error.msg}") from None
    return records
