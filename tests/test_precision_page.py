"""The figures of docs/precision.md are those of the result files beside it, in both languages."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("precision.md", "precision_zh.md")]


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "precision" / f"{name}.json").read_text(encoding="utf-8"))


def test_every_precision_lives_on_the_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learnt, took the bytes that it should, went on with a checkpoint to the same adapter, and answered."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = import_module("precision")
    found = result("real")
    assert found["rows"] >= 200
    assert [run["setting"] for run in found["runs"]] == list(script.SETTINGS)
    for run in found["runs"]:
        assert len(run["losses"]) == found["steps"]
        assert all(run[kind][-1] < run[kind][0] for kind in script.MEASURED), run["setting"]
        assert abs(run["bits each"] - run["bits expected"]) <= 0.1 * run["bits expected"], run["setting"]
        assert 0 < run["resumed"]["from step"] < found["steps"] and run["resumed"]["adapter's bytes are equal"]
        assert not any(apart for what, apart in run["resumed"].items() if what.startswith("largest")), run["setting"]
        assert run["answer"]
        assert all(script.line(run) in page for page in PAGES), run["setting"]


def test_every_precision_learns_in_bf16() -> None:
    runs = result("real_bf16")["runs"]
    assert {run["setting"].split(", ")[-1] for run in runs} == {"16 bits", "8 bits", "4 bits", "3 bits", "2 bits"}
    for run in runs:
        assert run["held out"][-1][1] < run["held out"][0][1]
        assert abs(run["bits each"] - run["bits expected"]) <= 0.1 * run["bits expected"]
        cells = [run["setting"], f"{run['bits each']:.3g}", f"{run['bits expected']:.3g}", f"{run['frozen MB']:.0f}"]
        held = f"{run['held out'][0][1]:.2f} → {run['held out'][-1][1]:.2f} | {run['answer']} |"
        assert all(f"| {' | '.join(cells)} |" in page and held in page for page in PAGES), run["setting"]


def test_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = import_module("matrix")
    cells = result("matrix")["cells"]
    assert len(cells) == len(script.WEIGHTS) * len(script.ADAPTERS) * len(script.OPTIMIZERS)
    assert not [cell for cell in cells if cell["found"].startswith("FAULT")]
    assert all(plane in page for plane in script.pages(cells) for page in PAGES)
    trained = [cell for cell in cells if cell["found"][0] in "Tt"]
    assert all(f"{len(trained)} cells trained" in PAGES[0] and f"{len(trained)} 格训练成功" in PAGES[1] for _ in "x")
    assert all("R" in cell["found"] for cell in trained)  # none went on to other weights
