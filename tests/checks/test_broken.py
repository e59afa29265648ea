"""Broken data of a hundred kinds: each is told by file, row and path with what would mend it, and training agrees about every row."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checks.conftest import CASES, write_case
from finery.checks.data import Data
from finery.cli import main
from finery.data import ledger
from finery.data.load import DataOptions
from finery.data.rows.base import RowOptions
from finery.data.rows.chat import Chat
from finery.data.sample import Sample
from finery.data.template import Turn
from finery.data.tokenise import Asking
from finery.errors import UserError
from finery.methods.sft import SFT
from letters import Letters, open_sets

WriteRun = Callable[..., str]
OF_RUNS = [case for case in CASES if "entry" in case]
CHECKED = re.compile(r"(template 'chatml' on )?(data set '\S+'|hard conversations): \d+ rows? in \d+\.\d s")
"""The line about a data set that was read to its end, or proved."""


def is_like(line: str, expected: str) -> bool:
    """Whether a line is the expected one, in which {any} stands for what a library says."""
    return re.fullmatch(re.escape(expected).replace(r"\{any\}", ".+"), line) is not None


def test_there_are_enough_cases_and_none_twice() -> None:
    assert len(CASES) >= 100
    assert Counter(case["name"] for case in CASES).most_common(1)[0][1] == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_tells_what_is_broken(case: dict[str, Any], write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_case(case, tmp_path).name
    word = write_run({"x": {"file_name": file, **case["entry"]}}) if "entry" in case else file
    code = main(["check", word])
    *told, summary = capsys.readouterr().out.splitlines()
    checked = [line for line in told if CHECKED.match(line)]
    findings = told[: len(told) - len(checked)]
    assert len(findings) == len(case["expect"]), findings
    assert all(map(is_like, findings, case["expect"])), findings
    assert all("; " in line.partition(": ")[2] or "did you mean" in line for line in findings), "each says what would mend it"
    assert code == case["code"]
    assert summary.startswith("clean: nothing to mend in" if code == 0 else f"{len(findings)} finding")
    assert ("cannot begin" in summary) == (code == 2)


class Spelt:
    """Stands for a template: a letter is a token, and every answer ends with 0."""

    late_end = None

    tokenise = Letters()

    def turns(self, sample: Sample) -> Asking[list[list[Turn]]]:
        """One conversation; no tokenizer is asked."""
        yield from ()
        turns, source = [], [ord(letter) for letter in sample.system]
        for message in sample.messages:
            letters = [ord(letter) for letter in message.content]
            if message.role in ("assistant", "function"):
                turns.append(Turn(source, [*letters, 0], learn=message.train is not False))
                source = []
            else:
                source += letters
        return [turns]


def chat_rows() -> Chat:
    """The rows that supervised training reads."""
    template: Any = Spelt()
    return Chat(template, RowOptions(cutoff_len=4096))


def entry_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Its entry, with the whole path of its file."""
    return {"file_name": str(write_case(case, folder)), **case["entry"]}


@pytest.mark.parametrize("case", [case for case in OF_RUNS if case["code"] == 2], ids=lambda case: case["name"])
def test_training_refuses_what_stops_a_run(case: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        open_sets({"x": entry_of(case, tmp_path)}, chat_rows()).stop()


def test_training_leaves_out_what_the_check_says(tmp_path: Path) -> None:
    """All data sets with which training begins, in one run: the same rows of each are left out, the others are learnt."""
    cases = {f"x{number}": case for number, case in enumerate(OF_RUNS) if case["code"] < 2}
    assert len(cases) > 50
    entries = {name: entry_of(case, tmp_path / name) for name, case in cases.items()}
    sets = open_sets(entries, chat_rows())
    assert sets.train is not None
    sets.train.samples.encode_all()
    trained = ledger.report(sets.by_name)["train"]["data_sets"]
    sets.stop()
    check = Data()
    options = DataOptions.model_validate({"dataset": list(entries), "dataset_dir": entries})
    findings = list(check.look(options, {}, SFT(SFT.Options.model_validate({}))))
    for name, checked in zip(entries, check.checked, strict=True):
        case, line = cases[name]["name"], trained[name]
        assert (checked.num_rows, checked.num_used) == (line["seen"], line["used"]), case
        left_out = [finding for finding in findings if finding.effect == "left out" and f"/{name}/" in finding.place]
        told = sorted(row.rpartition(":")[2] for finding in left_out for row in finding.rows)
        assert told == sorted(re.findall(r"row (\d+)", str([reason["first"] for reason in line["left_out"]]))), case
        assert sum(finding.num_rows for finding in left_out) == line["seen"] - line["used"], case
