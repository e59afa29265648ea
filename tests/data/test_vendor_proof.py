"""Vendors' own templates on their vocabularies: every drawn conversation is proved, or refused with a reason."""

import copy
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from drawn_talks import talks
from finery.checks.template import prepared
from finery.data.proof import Proof
from finery.data.rows.base import RowOptions
from finery.data.sample import Sample
from finery.data.template import TemplateOptions, load_template
from finery.models.new_tokens import TokenOptions

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "soak" / "vendor_templates.json"
FEW, MANY = 8, 250
"""Conversations that are drawn for each template: in every test run, and by `make soak`."""
WAYS: list[tuple[dict[str, Any], int]] = [
    ({}, MANY),
    ({"enable_thinking": False, "default_system": "Be kind."}, MANY // 5),
    ({"enable_thinking": None}, MANY // 5),
]
UNUSABLE = {"CohereForAI-c4ai-command-r-plus-tool_use.jinja", "fireworks-ai-llama-3-firefunction-v2.jinja"}
"""These take no plain question: one wants documents, the other a list of functions."""
INDEX = Path(__file__).parents[3] / "shared" / "vendor" / "index.json"


def names() -> list[str]:
    """The templates that are there."""
    return sorted(set(json.loads(INDEX.read_text(encoding="utf-8"))["templates"]) - UNUSABLE) if INDEX.is_file() else []


def proof_of(tokenizer: Any, **options: Any) -> Proof:
    """The proof as a run prepares it."""
    chosen = TemplateOptions.model_validate(options)
    run = SimpleNamespace(
        model=SimpleNamespace(trust_remote_code=False, model_name_or_path="x"),
        tokens=TokenOptions(),
        template=chosen,
        rows=RowOptions(cutoff_len=64),
    )
    proof, faults = prepared(run, load_template(chosen, tokenizer), Path())
    assert faults == []
    return proof


def prove(proof: Proof, num: int) -> Counter[str]:
    """Draw conversations and prove them; how many went which way."""
    ways: Counter[str] = Counter()
    special = [str(word) for word in proof.template.tokenizer.all_special_tokens][:12]

    @settings(
        max_examples=num,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(sample=talks(special))
    def each(sample: Sample) -> None:
        proved = proof.of(sample)
        assert [fault for fault in proved.faults if fault.fatal] == []
        assert (proved.way == "refused") == bool(proved.reason)
        ways[proved.way] += 1

    each()
    return ways


@pytest.mark.parametrize("name", names())
def test_some_conversations(vendor: Callable[[str], Any], name: str) -> None:
    tokenizer = copy.deepcopy(vendor(name))
    template = load_template(TemplateOptions(), tokenizer)
    ways = prove(Proof(template, template, tokenizer), FEW)
    assert ways["row"] + ways["turns"] > 0, "not all may be refused"


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, Any]]:
    """What `make soak` has seen, written when all templates are through."""
    found: dict[str, Any] = {}
    yield found
    if found.keys() == set(names()):
        versions = {package: version(package) for package in ("transformers", "tokenizers", "hypothesis")}
        facts = {"command": 'make soak ARGS="-k vendor"', "date": str(date.today()), "python": platform.python_version()}
        facts |= {"versions": versions, "templates": found}
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(facts, indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_many_conversations(vendor: Callable[[str], Any], name: str, figures: dict[str, Any]) -> None:
    """With what is saved and loaded again, and with each of the ways to think."""
    ways: Counter[str] = Counter()
    for options, num in WAYS:
        ways += prove(proof_of(copy.deepcopy(vendor(name)), **options), num)
    proved = ways["row"] + ways["turns"]
    figures[name] = {"proved": proved, "as one row": ways["row"], "as one row per answer": ways["turns"], "refused": ways["refused"]}


def test_the_soak_has_seen_every_template(shared: Path) -> None:
    """And the page says what it saw."""
    found = json.loads(FIGURES.read_text(encoding="utf-8"))
    assert found["templates"].keys() == set(names())
    assert all(sum((each["proved"], each["refused"])) >= MANY for each in found["templates"].values())
    total = sum(each["proved"] for each in found["templates"].values())
    for page in ("templates.md", "templates_zh.md"):
        assert f"{total:,}" in (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert f"{len(found['templates'])} " in (ROOT / "docs" / page).read_text(encoding="utf-8").partition("make soak")[2][:200]
