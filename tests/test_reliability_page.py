"""docs/reliability.md tells of every key that may differ on resume, and of the figures that were measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finery.run import own_keys
from finery.training.arguments import trainer_fields
from finery.training.starting import may_differ
from killed import OWN, PHASES
from kills import CASES, DEMANDED

DOCS = Path(__file__).parents[1] / "docs"


HOW = {
    "freely": "freely",
    "with `resume_from_checkpoint`, told": "told",
    "随意": "freely",
    "给出 `resume_from_checkpoint` 时可以，会说明": "told",
}
"""What a row of the table says first of its keys."""


@pytest.mark.parametrize("name", ["reliability.md", "reliability_zh.md"])
def test_the_table_of_what_may_differ_is_the_rule(name: str) -> None:
    """Every key stands in it once, in a row that says how it may differ; no other key does."""
    heading = {"reliability.md": "| keys | may differ |", "reliability_zh.md": "| 键 | 可否不同 |"}[name]
    text = (DOCS / name).read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.split(f"{heading}\n|---|---|\n")[1].split("\n\n")[0].splitlines()]
    told: dict[str, list[str]] = {"freely": [], "told": []}
    for keys, said in rows[:-1]:
        assert re.fullmatch(r"`\w+`( `\w+`)*", keys), keys
        told[HOW[re.split("[:：]", said)[0]]] += re.findall(r"\w+", keys)
    assert "`" not in rows[-1][0], "the last row is of all others"
    for how, keys in told.items():
        assert sorted(keys) == sorted(may_differ(how))


@pytest.mark.parametrize("name", ["reliability.md", "reliability_zh.md"])
def test_what_the_ledger_costs_is_what_was_measured(name: str) -> None:
    found = json.loads((DOCS / "speed" / "loss_ledger.json").read_text())
    text = (DOCS / name).read_text(encoding="utf-8")
    least, most = found["ratio_interval"]
    words = (f"{found['ratio']:.3f}", f"{least:.3f}", f"{most:.3f}", f"{found['pairs']} ", f"{100 * found['own_share']:.2f} %")
    (line,) = [line for line in text.splitlines() if line.startswith("`loss_ledger: true`")]
    assert [word for word in words if word not in line] == []
    assert most < 1.02 and found["own_share"] < 0.02


def test_keys_that_may_differ_exist() -> None:
    known = own_keys() | trainer_fields().keys()
    assert [key for how in ("freely", "told") for key in may_differ(how) if key not in known] == []
    assert not may_differ("freely") & may_differ("told")


PHASES_ZH = {
    "before the first step": "第一步之前",
    "preprocessing": "预处理中",
    "inside a step": "一步之中",
    "after a step": "一步之后",
    "inside an evaluation": "评估中",
    "inside a save": "保存中",
    "at an epoch edge": "轮次交界",
    "the final save": "最终保存",
    "after training": "训练之后",
    OWN: "独立进程中任意时刻",
}
COUNTED = {
    "reliability.md": (
        "Counted on {date} (`{command}`; Finery {finery}, torch {torch}, transformers {transformers}, peft {peft}, Python {python}): "
        "{kills} kills, {runs} runs compared, faults: {faults}. A kill cost at most {largest} steps that were done before, "
        "all kills together {total}; those while preprocessing fell when {least} to {most} rows were still to be encoded."
    ),
    "reliability_zh.md": (
        "{date} 计数（`{command}`；Finery {finery}，torch {torch}，transformers {transformers}，peft {peft}，Python {python}）："
        "杀 {kills} 次，比较 {runs} 次训练，错误：{faults}。每次被杀最多重做 {largest} 步，全部加起来 {total} 步；"
        "预处理中被杀时，还有 {least} 到 {most} 行没有编码。"
    ),
    "../README.md": "{kills} kills counted, 0 differences",
    "../README_zh.md": "数过 {kills} 次，0 处差异",
}
"""What a page says of the campaign, in a line of its own or, in a README, within one."""


def lines_of_kills(name: str, told: dict[str, Any]) -> list[str]:
    """How the lines of a page that tell of kills have to read."""
    none = "无" if name.endswith("_zh.md") else "none"
    facts = told["versions"] | told["steps_again"] | told["rows_left_preprocessing"]
    counted = COUNTED[name].format(
        **facts, date=told["date"], command=told["command"], kills=told["kills"], runs=told["runs_compared"], faults=told["faults"] or none
    )
    if name.startswith(".."):
        return [counted]
    names = PHASES_ZH if name.endswith("_zh.md") else {phase: phase for phase in PHASES}
    return [counted, *(f"| {names[phase]} | {told['by_phase'].get(phase, 0)} |" for phase in PHASES)]


@pytest.mark.parametrize("name", COUNTED)
def test_the_kills_are_those_that_were_counted(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    wanted = lines_of_kills(name, json.loads((DOCS / "soak" / "kills.json").read_text()))
    lacking = [line for line in wanted if not (line in text if name.startswith("..") else line in text.splitlines())]
    assert not lacking, "\n".join([f"{name} has to say:", *lacking])


def test_the_kills_that_were_counted_are_enough() -> None:
    """As many as were asked for, in each phase that the promise names, and by the form that `make soak` runs."""
    told = json.loads((DOCS / "soak" / "kills.json").read_text())
    assert not told["faults"] and told["kills"] >= 200
    assert all(told["by_phase"][phase] >= 5 for phase in DEMANDED)
    assert told["command"] == "python tests/kills.py --kills 210 --seed 12 --result docs/soak/kills.json"
    assert list(told["by_case"]) == list(CASES) and all(sum(phases.values()) for phases in told["by_case"].values())
    assert {phase: sum(phases[phase] for phases in told["by_case"].values()) for phase in told["by_phase"]} == told["by_phase"]
    assert all(one["largest"] <= one["from_save_to_save"] for one in told["steps_again"]["by_case"].values())
    assert told["rows_left_preprocessing"]["least"] > 0
