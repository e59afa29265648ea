"""The check of data: several data sets at once, parts of them, streams, and what it costs."""

import ast
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from finery.checks import base, data
from finery.checks.base import Finding
from finery.checks.data import Data
from finery.data import formats, sources, tables
from finery.data.load import DataOptions
from finery.data.registry import Catalogue, DatasetEntry, StreamSettings
from finery.data.sample import BadRecord
from finery.data.sources import Source
from finery.data.tables.base import Table
from finery.methods.sft import SFT

WriteRun = Callable[..., str]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the test's own folder."""
    monkeypatch.chdir(tmp_path)


def pair(number: int, **more: Any) -> dict[str, Any]:
    """A record unlike others."""
    return {"instruction": f"Name colour {number}.", "output": f"Colour {number}.", **more}


def write(name: str, *records: Any) -> dict[str, Any]:
    """Write JSON lines; returns their entry."""
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"file_name": name}


def look(entries: dict[str, Any], **options: Any) -> list[str]:
    """What is found in the data sets of a registry: all for training, unless options say otherwise."""
    return [str(finding) for finding in findings(entries, **options)]


def findings(entries: dict[str, Any], check: Data | None = None, **options: Any) -> list[Finding]:
    given = DataOptions.model_validate({"dataset": list(entries), "dataset_dir": entries, **options})
    return list((check or Data()).look(given, {}, SFT(SFT.Options.model_validate({}))))


def test_every_data_set_is_looked_at_though_others_cannot_be_read() -> None:
    Path("torn.json").write_text("[{")
    Path("void.csv").write_text("")
    entries = {"a": {"file_name": "torn.json"}, "b": {"file_name": "void.csv"}, "c": write("c.jsonl", pair(1), {"instruction": "a"})}
    check = Data()
    told = [str(finding) for finding in findings(entries, check)]
    assert told[0].startswith("torn.json:1: this is not JSON: ")
    assert told[1] == "data set 'b': void.csv is empty; it should hold records (stops the run)"
    assert told[2].startswith("c.jsonl:1:output: is not in the record; ")
    assert len(told) == 3
    assert [(one.name, one.num_rows, one.num_used) for one in check.checked] == [("data set 'c'", 2, 1)]


def test_samples_that_repeat_others() -> None:
    entries = {"a": write("a.jsonl", pair(1), pair(2)), "b": write("b.jsonl", pair(3), pair(2, id=7), pair(4), pair(1))}
    said = "b.jsonl:1: is the same sample as a.jsonl:1; keep one of them, unless it is meant to count more than once"
    assert look(entries) == [f"{said} (2 rows: 1, 3)"], "whatever stands in columns that nobody reads"
    assert look(entries, val_size=0.5) == [f"{said}; 'val_size' may put one into training and the other into evaluation (2 rows: 1, 3)"]
    assert look(entries, dataset=["a"], eval_dataset=["b"]) == [
        "b.jsonl:1: is evaluated on, and is trained on as a.jsonl:1; "
        "take it out of one of them: an evaluation on what was learnt says nothing (2 rows: 1, 3)"
    ]
    assert len(look(entries, dataset=["a"], eval_dataset=["a"])) == 1


def test_samples_that_differ_are_no_repeats() -> None:
    same = pair(1)
    assert (
        look(
            {
                "a": write(
                    "a.jsonl", same, same | {"input": "b"}, same | {"output": "c"}, {"instruction": "Name colour 1.Colour", "output": "1."}
                )
            }
        )
        == []
    )


@pytest.mark.parametrize(
    ("entry", "options", "rows", "said"),
    [
        ({}, {}, [3, 7], "10 rows"),
        ({"split": "train[4:]"}, {}, [7], "6 of 10 rows"),
        ({}, {"max_samples": 5}, [3], "5 of 10 rows"),
        ({"num_samples": 5}, {"max_samples": 5}, [3, 7], "10 rows"),
    ],
)
def test_only_what_a_run_takes_is_looked_at(entry: dict[str, Any], options: dict[str, Any], rows: list[int], said: str) -> None:
    records = [pair(number) if number not in (3, 7) else {"instruction": "a"} for number in range(10)]
    check = Data()
    (found,) = findings({"x": write("x.jsonl", *records) | entry}, check, **options)
    assert found.rows == tuple(f"x.jsonl:{row}" for row in rows)
    assert f": {said} in " in str(check.checked[0])


def test_a_part_that_holds_nothing() -> None:
    (told,) = look({"x": write("x.jsonl", pair(1)) | {"split": "train[5:]"}})
    assert told.startswith("data set 'x': its split 'train[5:]' holds no records; ")


def test_files_of_a_folder_are_told_apart() -> None:
    write("d/a.jsonl", pair(1), {"instruction": "a"})
    write("d/b.jsonl", {"instruction": "b"}, pair(2))
    Path("d/c.csv").write_text("instruction,output\nx,\n")
    Path("d/notes.md").write_text("not read")
    (first, second) = findings({"x": {"file_name": "d"}})
    assert (first.place, first.rows, first.num_rows) == ("d/a.jsonl:1:output", ("d/a.jsonl:1", "d/b.jsonl:0"), 2)
    assert "2 rows: 1, d/b.jsonl:0; left out" in str(first)
    assert (second.place, second.line) == ("d/c.csv:0:output", 2)


def test_evaluation_sets_are_looked_at_each_by_itself() -> None:
    entries = {"a": write("a.jsonl", pair(1)), "b": write("b.jsonl", {"instruction": "a"}), "c": write("c.jsonl", pair(2))}
    together: dict[str, Any] = {"dataset": ["a"], "eval_dataset": ["b", "c"]}
    assert not any(finding.fatal for finding in findings(entries, **together)), "a row of c is left"
    *_, last = findings(entries, **together, eval_on_each_dataset=True)
    assert str(last) == "eval_dataset: no row is left to evaluate on; mend what is told above (stops the run)"


def test_placeholders_that_are_filled_in() -> None:
    entries = {"x": write("x.jsonl", pair(1, input="Are you {{name}}?"), pair(2, input="By {{author}}"))}
    assert [told.partition(":0:")[2][:34] for told in look(entries)][:1] == ["instruction: still says {{name}}; "]
    assert len(look(entries)) == 2
    assert [told.partition(" (")[0] for told in look(entries, placeholders={"name": "Ada"})] == [
        "x.jsonl:1:instruction: still says {{author}}; set 'placeholders' to {author: ...} to fill it in"
    ]


class Stream(Table):
    """Rows that come one after the other and never end."""

    sequential = True

    def __init__(self, settings: StreamSettings) -> None:
        super().__init__(Path("a/b"), Path())
        self.settings = settings
        self.next = 0

    @property
    def content(self) -> str:
        """Stands for the bytes."""
        return "a stream"

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Nothing."""

    def __len__(self) -> int:
        assert self.settings.num_rows is not None
        return self.settings.num_rows

    def __getitem__(self, row: int) -> Any:
        assert row == self.next, "in order, each row once"
        self.next += 1
        return pair(row % 10) if row % 100 else {"instruction": "a"}


def test_the_beginning_of_a_stream_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Stream] = []

    def stream(name: str, entry: DatasetEntry, settings: StreamSettings, download: Any) -> Stream:
        opened.append(Stream(settings))
        return opened[-1]

    monkeypatch.setattr(sources, "stream_table", stream)
    check = Data()
    (found,) = findings({"x": {"hf_hub_url": "a/b"}}, check, streaming=True)
    assert (found.num_rows, opened[0].next, opened[0].settings.shuffle) == (10, base.NUM_STREAMED, False)
    assert "1,000 of a stream's rows in" in str(check.checked[0])


def test_findings_stay_bounded() -> None:
    """Every row is broken in a way of its own."""
    talk = [{"conversations": [{"from": f"role {chr(0x4E00 + n)}", "value": "a"}, {"from": "gpt", "value": "b"}]} for n in range(3000)]
    check = Data()
    found = findings({"x": write("x.jsonl", *talk) | {"formatting": "sharegpt"}}, check)
    assert base.MOST_KINDS < len(found) <= 2 * base.MOST_KINDS + 2
    assert sum(finding.num_rows for finding in found) == 3000


class Counter(data.Rate):
    """Counts the objects that are alive while rows go by."""

    alive: ClassVar[list[int]] = []

    def add(self, amount: float) -> None:
        """One row more."""
        super().add(amount)
        if self.done % 1000 == 0:
            self.alive.append(sys.getallocatedblocks())


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 50_000
    with Path("x.jsonl").open("w") as file:
        for number in range(rows):
            answer = f'"Colour {number}."' if number % 50 else "null"
            file.write(f'{{"instruction": "Name colour {number}.", "output": {answer}}}\n')
    monkeypatch.setattr(data, "Rate", Counter)
    (found,) = findings({"x": {"file_name": "x.jsonl"}})
    assert found.num_rows == rows // 50
    assert len(Counter.alive) == 50
    assert max(Counter.alive) - Counter.alive[0] < 1000, "of 49,000 rows nothing is kept but a hash in an array"


# ------------------------------------------------------------------ whatever stands in a record

JUNK: list[Any] = [
    None,
    "",
    " ",
    "{{name}}",
    "a\ufffdb",
    5,
    -1.5,
    float("nan"),
    True,
    [],
    {},
    [None],
    [[]],
    {"a": [1]},
    "[",
    "{}",
    '{"name": 3}',
    "<image>",
    b"x".hex(),
]
ROUND = [{"from": "human", "value": "Weather?"}, {"from": "function_call", "value": '{"name": "look", "arguments": {}}'}]
SEEDS = [
    ({"columns": {"prompt": "instruction", "response": "output", "history": "history", "system": "system", "tools": "tools"}},
     pair(1, history=[["a", "b"]], system="Be brief.", tools='[{"name": "look"}]')),
    ({"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools", "system": "system"}},
     {"conversations": [*ROUND, {"from": "observation", "value": "Sun."}, {"from": "gpt", "value": "Sunny."}],
      "tools": [{"name": "look"}], "system": ""}),
    ({"formatting": "openai"},
     {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}, {"type": "text", "text": "You?"}]},
                   {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]},
                   {"role": "tool", "content": "Sun."},
                   {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm.", "train": True}],
      "tools": [{"type": "function", "function": {"name": "look"}}]}),
]  # fmt: skip


def mutated(value: Any, dice: random.Random) -> Any:
    """A value with one of its parts, or itself, replaced by junk or taken out."""
    inner = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not inner or dice.random() < 0.15:
        return dice.choice(JUNK)
    copy, place = value.copy(), dice.choice(list(inner))
    if dice.random() < 0.15:
        del copy[place]
    else:
        copy[place] = mutated(copy[place], dice)
    return copy


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_no_record_breaks_the_check(number: int) -> None:
    entry, seed = SEEDS[number]
    dice = random.Random(number)
    records = [seed]
    for _ in range(600):
        record = seed
        for _ in range(dice.choice((1, 1, 2))):
            record = mutated(record, dice)
        records.append(record)
    entries = {"x": write("x.jsonl", *records) | entry}
    check = Data()
    found = findings(entries, check)
    source = sources.open_source("x", Catalogue(entries), {}, {}, {})
    readable = [row for row in range(len(source)) if (sample := read(source, row)) is not None and not sample.unanswered]
    unlearnt = sum(finding.num_rows for finding in found if "none of its answers" in finding.what)
    assert check.checked[0].num_used == len(readable) - unlearnt
    assert 100 < len(readable) < 550, "both kinds are met"
    assert {finding.effect for finding in found} == {"left out", "kept"}


def read(source: Source, row: int) -> Any:
    try:
        return source.sample(row)
    except BadRecord:
        return None


# ------------------------------------------------------------------ what would mend it


def said_by_readers() -> Iterator[str]:
    """Every reason for which a record may be refused, 'x' where something is filled in."""
    folders = [Path(str(formats.__file__)).parent, Path(str(tables.__file__)).parent]
    for path in [*(file for folder in folders for file in folder.glob("*.py")), Path(sources.__file__)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "BadRecord":
                pieces = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
                yield "".join(str(piece.value) if isinstance(piece, ast.Constant) else "'x'" for piece in pieces)


def test_every_reason_has_a_mend_of_its_own() -> None:
    said = [text for text in said_by_readers() if set(text) - set("'x[1:]")]
    assert len(said) > 35
    for text in said:
        what, mend = base.mended(text, "nothing")
        assert mend != "nothing", f"{text!r} needs a line in checks/mends.yaml"
        assert what
