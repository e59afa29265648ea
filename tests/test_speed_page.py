"""The figures of docs/speed.md are those of the result files beside it."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "speed" / f"{name}.json").read_text(encoding="utf-8"))


def kernel_lines() -> Iterator[str]:
    for row in [*result("h100")["rows"], *result("kernels")["rows"]]:
        cells = [row["setting"], f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}", f"{row['peak_mb']:,} MB"]
        yield f"| {' | '.join([*cells, format(row['train_loss'], '.4f')])} |"


def test_what_each_kernel_brings() -> None:
    assert [line for line in kernel_lines() if line not in PAGE] == []


def test_the_table_beside_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = import_module("against_llamafactory")
    rows = [row for name in ("against_llamafactory", "one_thread", "full") for row in result(name)["rows"]]
    lines = [script.table_line(row) for row in rows if "peak_mb" in row]
    assert script.HEAD in PAGE and [line for line in lines if line not in PAGE] == []
    for row in (row for row in rows if "peak_mb" not in row):
        assert f"{row['seconds']:.2f} times the time and {row['memory']:.2f} times the memory" in PAGE


def test_the_table_of_lengths() -> None:
    points = result("lengths")["points"]
    for name, form in (("length", ""), ("peer", ".0f"), ("finery", ".0f"), ("peer MB", ","), ("finery MB", ",")):
        assert f" | {' | '.join(format(point[name], form) for point in points)} |" in PAGE, name
    assert "(speed/lengths.png)" in PAGE and (ROOT / "docs" / "speed" / "lengths.png").stat().st_size > 10_000


def test_the_losses_of_fifty_steps() -> None:
    found = result("parity")
    assert found["steps"] == 50
    for name in ("fp32", "bf16", "plain_bf16"):
        assert found[name]["largest"] < found[name]["limit"] and f"{found[name]['largest']:.1e}" in PAGE, name


def test_the_files_say_how_they_came_about() -> None:
    for path in (ROOT / "docs" / "speed").glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["command"].startswith("python benchmarks/") and (ROOT / found["command"].split()[1]).exists(), path
        assert found["date"] and (found.get("machine") or found.get("processor"))
