"""The pages of exports say what was measured, and no more."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = spec_from_file_location("exports", ROOT / "benchmarks" / "exports.py")
assert SPEC and SPEC.loader
exports = module_from_spec(SPEC)
SPEC.loader.exec_module(exports)

PAGES = [ROOT / "docs" / name for name in ("export.md", "export_zh.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_is_of_a_result_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    real = json.loads((ROOT / "docs/export/real.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in real] == list(exports.ROUTES)
    for row in real:
        assert row["passed"] and exports.line(row) in text
    for row in json.loads((ROOT / "docs/export/merging.json").read_text(encoding="utf-8"))["rows"]:
        assert (
            "| " + " | ".join(f"{row[key]:,}" for key in ("files", "model_mb", "adapter_mb", "by_layers_mb", "in_memory_mb")) + " |" in text
        )


def test_memory_does_not_grow_with_the_files() -> None:
    rows = json.loads((ROOT / "docs/export/merging.json").read_text(encoding="utf-8"))["rows"]
    own = [row["by_layers_mb"] - row["adapter_mb"] for row in rows]
    assert max(own) < 1.25 * min(own) and rows[-1]["files"] >= 8 * rows[0]["files"] and rows[-1]["model_mb"] > 5 * max(own)
