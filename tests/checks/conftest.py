"""What the tests of checks share: broken data, written as a table says."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml

CASES: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("broken.yaml").read_text(encoding="utf-8"))
RUN = {"output_dir": "out", "do_train": True, "dataset": "x", "dataset_dir": "."}


def write_case(case: dict[str, Any], folder: Path) -> Path:
    """The file of a case, written into `folder`."""
    path = folder / case.get("file", "x.jsonl")
    folder.mkdir(exist_ok=True)
    if "parquet" in case:
        parquet.write_table(pa.table(case["parquet"]), path)
    elif "hex" in case:
        path.write_bytes(bytes.fromhex(case["hex"]))
    else:
        text = case["text"].replace("{deep}", "[" * 100_000).replace("{digits}", "0" * 5000)
        raw = text.encode(case.get("encoding", "utf-8"))
        raw = gzip.compress(raw) if case.get("compress") else raw
        path.write_bytes(raw[: len(raw) - case.get("cut", 0)])
    return path


@pytest.fixture
def write_run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write the file of a run, gone into its folder; `entries` are those of its dataset_info.json."""
    monkeypatch.chdir(tmp_path)

    def write(entries: dict[str, Any], **keys: Any) -> str:
        (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN | {"model_name_or_path": str(tiny_model), "template": "chatml"} | keys))
        return "run.yaml"

    return write
