"""Names become sets of rows: files of every kind, sampling, splits, placeholders, what is left out, and the cache."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from finery.data import ledger
from finery.data.load import DataOptions, Preparation, Sets, load_sets
from finery.data.packing import PackingOptions
from finery.data.rows.base import Row, RowOptions
from finery.data.rows.chat import Chat
from finery.data.sample import Message, Sample
from finery.data.slots import SlotTemplate
from finery.errors import UserError
from finery.methods.sft import SFT


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for every test."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))


RowsOf = Callable[[Any], list[Row]]
Load = Callable[..., Sets]
Learnt = Callable[[Any], list[str]]
MakeData = Callable[..., str]


def records(count: int) -> list[dict[str, str]]:
    """Numbered alpaca records."""
    return [{"instruction": f"say {n}", "input": "", "output": f"answer {n}"} for n in range(count)]


def same(one: list[Row], other: list[Row]) -> bool:
    """Whether these are the same rows."""
    pairs = list(zip(one, other, strict=True))
    return bool(pairs) and all(np.array_equal(a.ids, b.ids) and np.array_equal(a.labels, b.labels) for a, b in pairs)


def left_out(sets: Sets) -> list[tuple[str, int, list[str]]]:
    """Reason, number and first places of what the training set leaves out, when all is encoded."""
    assert (found := ledger.report(sets.by_name)["train"])["complete"]
    return [(line["reason"], line["samples"], line["first"]) for line in found["data_sets"]["x"]["left_out"]]


THREE = ["answer 0", "answer 1", "answer 2"]
LINES = "\n".join(json.dumps(record) for record in records(3))
CSV = "instruction,input,output\n" + "".join(f"say {n},,answer {n}\n" for n in range(3))


@pytest.mark.parametrize(
    ("file_name", "text"),
    [
        ("x.json", json.dumps(records(3), indent=1)),
        ("x.jsonl", LINES),
        ("x.json", LINES),
        ("x.jsonl", LINES.replace("\n", "\r\n\r\n")),
        ("x.json", "\ufeff" + json.dumps(records(3))),
        ("x.jsonl", "\ufeff" + LINES),
        ("x.csv", CSV),
        ("x.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
    ],
)
def test_text_files(make_data: MakeData, load: Load, learnt: Learnt, file_name: str, text: str) -> None:
    assert learnt(load(make_data(text, file_name)).train) == THREE


def test_tables(make_data: MakeData, load: Load, learnt: Learnt, tmp_path: Path) -> None:
    table = Dataset.from_list(records(3))
    table.to_parquet(str(tmp_path / "t.parquet"))
    table.save_to_disk(str(tmp_path / "arrow"))
    (arrow,) = (tmp_path / "arrow").glob("*.arrow")
    for file in ("t.parquet", str(arrow)):
        folder = make_data("", "unused.json")
        (Path(folder) / "dataset_info.json").write_text(json.dumps({"x": {"file_name": file}}))
        assert learnt(load(folder).train) == THREE


def test_txt_is_one_record_a_line(make_data: MakeData, load: Load, rows_of: RowsOf, tokenizer: Any) -> None:
    """A line has a column `text` and no answer: pretraining reads it, supervised training has nothing to learn from it."""
    folder = make_data("one\ntwo\u2028still two\r\n\nfour\n", "x.txt", columns={"prompt": "text"})
    sets = load(folder, stage="pt", packing=False)
    texts = ["one", "two\u2028still two", "four"]
    assert [tokenizer.decode(row.ids) for row in rows_of(sets.train)] == [text + "<|im_end|>" for text in texts]
    assert left_out(sets) == [("the question is empty: nothing stands in 'text'", 1, ["x.txt row 2"])]
    with pytest.raises(UserError, match="no row is left to train on: none of the 4 samples can be used: .*'output'"):
        load(folder)


def test_line_separators_inside_a_text_do_not_cut_the_line(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    answer = "a\u2028b\u0085c\x0bd"
    line = json.dumps({"instruction": "x", "output": answer}, ensure_ascii=False).replace("\\u000b", "\x0b")
    text = line.replace("\x0b", "\\u000b") + "\n" + json.dumps({"instruction": "x", "output": "second"})
    assert learnt(load(make_data(text, "x.jsonl")).train) == [answer, "second"]


def test_cells_of_a_csv_are_text(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    text = 'instruction,output\n1,42\nq,NA\nq,"two\nlines, ""quoted"""\nq,None\n'
    assert learnt(load(make_data(text, "x.csv")).train) == ["42", "NA", 'two\nlines, "quoted"', "None"]


def test_an_empty_cell_is_no_answer(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    sets = load(make_data("instruction,output\na,\nb,yes\n", "x.csv"))
    assert learnt(sets.train) == ["yes"]
    assert left_out(sets) == [("'output' should be text, found nothing", 1, ["x.csv row 0 (line 2)"])]


@pytest.mark.parametrize(("split", "answers"), [("train", THREE[:2]), ("test", THREE[2:])])
def test_the_files_of_a_split(make_data: MakeData, load: Load, learnt: Learnt, split: str, answers: list[str]) -> None:
    """A folder stands for a hub's snapshot; a hub's own descriptions hold no records."""
    make_data(records(3)[:2], "hub/data/train-00000.json")
    make_data(records(3)[2:], "hub/data/test-00000.json")
    folder = make_data({"default": {}}, "hub/data/dataset_infos.json")
    entry = {"hf_hub_url": str(Path(folder) / "hub"), "split": split}
    assert sorted(learnt(load({"x": entry}).train)) == answers
    with pytest.raises(UserError, match=r"no file in .* is named for the split 'other'"):
        load({"x": entry | {"split": "other"}})


def test_a_folder_is_read_in_the_order_of_names(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    make_data(records(3)[2:], "parts/c.json")
    make_data(LINES.split("\n")[1], "parts/b.jsonl")
    make_data("not data", "parts/README.md")
    folder = make_data(records(1), "parts/a.json")
    (Path(folder) / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "parts"}}))
    assert learnt(load(folder).train) == THREE
    assert learnt(load(folder, max_samples=2).train) == THREE[:2]


@pytest.mark.parametrize(
    ("content", "file_name", "words"),
    [
        ('[{"a": 1},\n {"b" 2}]', "x.json", r"x\.json:2: this is not JSON"),
        ('{"a": 1}\n{"b" 2}', "x.jsonl", r"this line is not JSON: Expecting ':' delimiter \(column 6\) \(x, x\.jsonl row 1\)"),
        (b'[{"a": "\xff"}]', "x.json", r"is not UTF-8 .*\(x, x\.json row 0\)"),
        (b"\xff\xfe[\x00]\x00", "x.json", "is text in UTF-16; save it as UTF-8"),
        ('{\n "a": 1\n}', "x.json", "holds one JSON object; it should hold a list of records, or one record a line"),
        ('[{"a": 1},', "x.json", "the file ends within the list"),
        (b"PAR1 and nothing", "x.parquet", "cannot be read as a parquet file"),
        ("hello", "x.docx", r"x\.docx should end in one of \.json"),
        ("", "x.json", r"x\.json is empty; it should hold records"),
        ("[]", "x.json", r"data set 'x' holds no records: .*x\.json is empty"),
    ],
)
def test_files_that_cannot_be_read(make_data: MakeData, load: Load, content: Any, file_name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(make_data(content, file_name))


def test_max_samples_takes_the_first_of_each_set(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    folder = make_data(records(9))
    path = Path(folder) / "dataset_info.json"
    path.write_text(json.dumps({"x": {"file_name": "x.json"}, "y": {"file_name": "x.json"}}))
    assert learnt(load(folder, dataset="x, y", max_samples=2).train) == THREE[:2] * 2
    assert learnt(load(folder, dataset="x, x", max_samples=2).train) == THREE[:2]


@pytest.mark.parametrize("count", [3, 5, 12])
def test_num_samples_draws_exactly_so_many(make_data: MakeData, load: Load, learnt: Learnt, count: int) -> None:
    folder = make_data(records(5), num_samples=count)
    drawn = learnt(load(folder).train)
    assert len(drawn) == count
    times = [drawn.count(f"answer {n}") for n in range(5)]
    assert max(times) - min(times) <= 1  # none is repeated before all were drawn
    assert learnt(load(folder).train) == drawn
    assert learnt(load(folder, seed=8).train) != drawn
    assert learnt(load(folder, max_samples=2).train) == drawn[:2]


