"""Names become sets of rows: files of every kind, sampling, splits, placeholders, what is left out, and the cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from finery.data import ledger
from finery.data.load import Sets
from finery.data.rows.base import Row
from finery.data.sample import Message, Sample
from finery.errors import UserError


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


def left_out(sets: Sets) -> list[tuple[str, int, list[str]]]:
    """Reason, number and first places of what the training set leaves out, when all is encoded."""
    found = ledger.report(sets.by_name)["train"]
    assert found["complete"]
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
    with pytest.raises(UserError, match=r"no row is left to train on: none of the 4 samples can be used: .*'output'"):
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
    assert left_out(sets) == [("'output' is null", 1, ["x.csv row 0 (line 2)"])]


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
        ('[{"a": 1}', "x.json", r"x\.json:1: this is not JSON: the file ends within the list"),
        ('[{"a": 1},\n', "x.json", r"x\.json:2: this is not JSON: the file ends within the list"),
        ('[{"a": 1},\n{"a":', "x.json", r"x\.json:2: this is not JSON: the file ends within a record"),
        ('[{"a": 1},\n{"a": "b', "x.json", r"x\.json:2: this is not JSON: the file ends within a record"),
        ('[{"a": 1},\n]', "x.json", r"x\.json:2: this is not JSON: a comma stands before the end of the list"),
        ('[{"a": 1}]\n[{"a": 2}]', "x.json", r"x\.json:2: this is not JSON: something follows after the end of the list"),
        ("a,a\n1,2\n", "x.csv", r"x\.csv:1: the header names 'a' twice"),
        ('a,b\n1,"2\n', "x.csv", r"x\.csv:2: this is not CSV"),
        (b"PAR1 and nothing", "x.parquet", "cannot be read as a parquet file"),
        ("hello", "x.docx", r"x\.docx should end in one of \.arrow, \.csv, \.json, \.jsonl, \.parquet, \.txt, also with \.gz or \.zst"),
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


@pytest.mark.parametrize(("size", "count"), [(0.25, 5), (0.01, 1), (3, 3), (1, 1), (1.0, 1), (19, 19)])
def test_val_size_splits_without_loss(make_data: MakeData, load: Load, learnt: Learnt, size: float, count: int) -> None:
    folder = make_data(records(20))
    sets = load(folder, val_size=size)
    train, held = learnt(sets.train), learnt(sets.eval)
    assert (len(train), len(held)) == (20 - count, count)
    every = [f"answer {n}" for n in range(20)]
    assert sorted(train + held) == sorted(every)
    assert [train, held] == [sorted(part, key=every.index) for part in (train, held)], "both keep the order of the file"
    again = load(folder, val_size=size)
    assert (learnt(again.train), learnt(again.eval)) == (train, held)


def test_the_seed_draws_what_is_held_out(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    folder = make_data(records(20))
    assert len({tuple(learnt(load(folder, seed=seed, val_size=3).eval)) for seed in range(3)}) > 1
    assert load(folder).eval is None


def test_val_size_must_leave_something(make_data: MakeData, load: Load) -> None:
    with pytest.raises(UserError, match="'val_size' takes 20 of 20 samples and leaves none to train on"):
        load(make_data(records(20)), val_size=20)


def test_a_part_of_a_split(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    for split, wanted in (("train[:20%]", range(2)), ("train[7:]", range(7, 10)), ("train[-3:-1]", range(7, 9)), ("train[50%:60%]", [5])):
        folder = make_data(records(10), split=split)
        assert learnt(load(folder).train) == [f"answer {n}" for n in wanted], split
    with pytest.raises(UserError, match=r"data set 'x': its split 'train\[6:2\]' holds no records"):
        load(make_data(records(10), split="train[6:2]"))


def test_eval_dataset_is_a_set_of_its_own(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    folder = make_data(records(4))
    sets = load(folder, dataset="", eval_dataset="x")
    assert sets.train is None
    assert learnt(sets.eval) == [f"answer {n}" for n in range(4)]
    assert learnt(load(folder, eval_dataset="x", max_samples=3).eval) == THREE


def test_each_evaluation_set_by_itself(make_data: MakeData, load: Load, learnt: Learnt, tmp_path: Path) -> None:
    (tmp_path / "y.json").write_text(json.dumps([{"instruction": "a", "output": "other"}]))
    sets = load(make_data(records(3)), eval_dataset="y.json, x", eval_on_each_dataset=True)
    assert isinstance(sets.eval, dict)
    assert {name: learnt(units) for name, units in sets.eval.items()} == {"y.json": ["other"], "x": THREE}
    both = load(make_data(records(3)), eval_dataset="y.json, x").eval
    assert learnt(both) == ["other", *THREE]


def test_a_path_needs_no_registry(
    make_data: MakeData, load: Load, learnt: Learnt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    assert learnt(load(str(tmp_path), dataset=str(tmp_path / "talk.jsonl")).train) == ["b"]
    assert "talk.jsonl: read as openai: messages in column 'messages'" in capsys.readouterr().err
    make_data(records(2), "many/a.json")
    make_data(records(3)[2:], "many/b.json")
    for name in ("many", "many/*.json", str(tmp_path / "many" / "[ab].json")):
        assert learnt(load(str(tmp_path), dataset=name).train) == THREE


WHO = {"instruction": "I am {{name}}", "output": "{{name}} by {{author}}", "sys": "You are {{name}}"}


def test_placeholders_are_filled(
    make_data: MakeData, load: Load, rows_of: RowsOf, learnt: Learnt, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_data([WHO], columns={"system": "sys"})
    sets = load(folder, placeholders={"name": "Ada", "author": "us"})
    assert learnt(sets.train) == ["Ada by us"]
    (row,) = rows_of(sets.train)
    assert "{{" not in (text := tokenizer.decode(row.ids))
    assert "You are Ada" in text
    assert "still say" not in capsys.readouterr().err


def test_unfilled_placeholders_are_told(make_data: MakeData, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_data([WHO, *records(2)], columns={"system": "sys"})
    load(folder, placeholders={"name": "Ada"})
    told = capsys.readouterr().err
    assert "data set 'x': samples still say {{author}}; set 'placeholders.author' to fill it in" in told
    assert "{{name}}" not in told


def test_records_left_out_are_counted_by_reason(
    make_data: MakeData, load: Load, learnt: Learnt, capsys: pytest.CaptureFixture[str]
) -> None:
    content: list[Any] = records(3)
    content[1:1] = [{"instruction": "a"}, "text", {"instruction": "b", "output": 7}, {"instruction": "c"}]
    sets = load(make_data("\n".join(map(json.dumps, content)), "x.jsonl"))
    assert learnt(sets.train) == THREE
    assert left_out(sets) == [
        ("'output' is not in the record", 2, ["x.jsonl row 1", "x.jsonl row 4"]),
        ("a record should be an object, found str", 1, ["x.jsonl row 2"]),
        ("'output' should be text, found int", 1, ["x.jsonl row 3"]),
    ]
    sets.stop()
    told = capsys.readouterr().err
    assert "data set x: x.jsonl row 1 is left out: 'output' is not in the record" in told
    assert "row 4" not in told, "the first of each kind is told at once"
    table = ledger.table(ledger.report(sets.by_name))
    assert "train: x: 2 left out: 'output' is not in the record (x.jsonl row 1, x.jsonl row 4)" in table


def test_a_line_that_is_no_json_is_left_out(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    lines = [LINES.split("\n")[0], '{"instruction": ', "\ufffe", *LINES.split("\n")[1:], '{"instruction": "cut o']
    sets = load(make_data("\n\n".join(lines), "x.jsonl"))
    assert learnt(sets.train) == THREE
    assert left_out(sets) == [
        ("this line is not JSON: Expecting value (column 17)", 2, ["x.jsonl row 1 (line 3)", "x.jsonl row 2 (line 5)"]),
        ("this line is not JSON: Unterminated string starting at (column 17)", 1, ["x.jsonl row 5 (line 11)"]),
    ]


def test_broken_characters_are_left_out(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    """JSON may write half of a pair of surrogates, which no tokenizer can read; a whole pair is one character."""
    whole = json.dumps({"instruction": "smile", "output": "\U0001f600"})
    assert "\\ud83d\\ude00" in whole
    broken = [r'{"instruction": "\ud83d", "output": "a"}', r'{"instruction": "b", "output": "half \ude00"}']
    sets = load(make_data("\n".join([LINES, *broken, whole]), "x.jsonl"))
    assert learnt(sets.train) == [*THREE, "\U0001f600"]
    assert left_out(sets) == [
        ("'instruction' has a broken character (a lone surrogate)", 1, ["x.jsonl row 3"]),
        ("'output' has a broken character (a lone surrogate)", 1, ["x.jsonl row 4"]),
    ]
    sets = load(make_data("[" + ",".join([*LINES.split("\n"), *broken]) + "]"))
    assert learnt(sets.train) == THREE


def test_rows_of_drawn_records_are_those_of_the_file(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    sets = load(make_data("\n".join(map(json.dumps, [*records(6), {"instruction": "a"}])), "x.jsonl", num_samples=7))
    assert len(learnt(sets.train)) == 6
    assert left_out(sets) == [("'output' is not in the record", 1, ["x.jsonl row 6"])]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"query": "imput"}, "column 'imput' is in none of its first 3 records; did you mean 'input'?"),
        ({"system": "frame"}, "column 'frame' is in none of its first 3 records"),
        ({"messages": "input"}, "column 'input' is named as 'messages', which 'formatting: alpaca' does not read"),
    ],
)
def test_a_column_that_is_named_in_vain_is_told(
    make_data: MakeData, load: Load, learnt: Learnt, columns: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the format reads should be there; what it does not read means nothing."""
    assert learnt(load(make_data(records(3), columns=columns)).train) == THREE
    assert f"warning: data set 'x': {told}\n" in capsys.readouterr().err


def test_a_misspelt_question_is_told_before_nothing_is_left(make_data: MakeData, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="none of the 3 samples can be used: the question is empty"):
        load(make_data(records(3), columns={"prompt": "instruktion"}))
    assert "column 'instruktion' is in none of its first 3 records; did you mean 'instruction'?" in capsys.readouterr().err


def test_columns_that_are_there_are_not_told(make_data: MakeData, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """Ragged records: a column may be in some of them only."""
    content = [records(1)[0], records(2)[1] | {"system": "s", "history": [["a", "b"]]}]
    load(make_data(content, columns={"prompt": "instruction", "system": "system", "history": "history"}))
    assert "column" not in capsys.readouterr().err


def test_messages_reach_the_template_unchanged(make_data: MakeData, load: Load) -> None:
    sets = load(make_data([{"instruction": "a", "input": "b", "output": "c", "sys": "s"}], columns={"system": "sys"}))
    assert sets.train is not None
    (source,) = sets.train.samples.sources
    assert source.sample(0) == Sample((Message("user", "a\nb"), Message("assistant", "c")), "s")
