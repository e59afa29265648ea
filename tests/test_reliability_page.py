"""docs/reliability.md tells of every key that may differ on resume."""

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


def test_keys_that_may_differ_exist() -> None:
    known = own_keys() | trainer_fields().keys()
    assert [key for how in ("freely", "told") for key in may_differ(how) if key not in known] == []
    assert not may_differ("freely") & may_differ("told")
