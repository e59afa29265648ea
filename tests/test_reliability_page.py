"""docs/reliability.md tells of every key that may differ on resume."""

import json
from pathlib import Path

import pytest

from finery.run import own_keys
from finery.training.arguments import trainer_fields
from finery.training.starting import may_differ

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["reliability.md", "reliability_zh.md"])
def test_all_that_may_differ_is_told(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    assert [key for how in ("freely", "told") for key in may_differ(how) if f"`{key}`" not in text] == []


@pytest.mark.parametrize("name", ["reliability.md", "reliability_zh.md"])
def test_what_the_ledger_costs_is_what_was_measured(name: str) -> None:
    found = json.loads((DOCS / "speed" / "loss_ledger.json").read_text())
    text = (DOCS / name).read_text(encoding="utf-8")
    assert all(figure in text for figure in (f" {found['ratio']} ", f"{100 * found['own_share']:.2f} %"))
    assert found["ratio"] < 1.02


def test_keys_that_may_differ_exist() -> None:
    known = own_keys() | trainer_fields().keys()
    assert [key for how in ("freely", "told") for key in may_differ(how) if key not in known] == []
    assert not may_differ("freely") & may_differ("told")
