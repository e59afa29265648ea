"""Names become encoded sets: files of every kind, sampling, splits, placeholders, and the cache."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from finery.data.load import DataOptions, Sets, load_sets, split
from finery.data.rows.chat import Chat
from finery.data.sample import Message, Sample
from finery.data.slots import SlotTemplate
from finery.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for every test."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))


Load = Callable[..., Sets]
Learnt = Callable[[Any], list[str]]
MakeData = Callable[..., str]


def records(count: int) -> list[dict[str, str]]:
    """Numbered alpaca records."""
    return [{"instruction": f"say {n}", "input": "", "output": f"answer {n}"} for n in range(count)]


def same(one: Any, other: Any) -> bool:
    """Whether two encoded sets hold the same units of the same rows."""
    names = ("ids", "labels", "row_ends", "unit_ends")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


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


def test_txt_is_one_record_a_line(make_data: MakeData, load: Load) -> None:
    """A line has a column `text` and no answer, so no row of this kind comes of it."""
    folder = make_data("one\ntwo\u2028still two\n\nfour\n", "x.txt", columns={"prompt": "text"})
    with pytest.raises(UserError, match="no row is left to train on"):
        load(folder)


def test_line_separators_inside_a_text_do_not_cut_the_line(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    answer = "a\u2028b\u0085c\x0bd"
    line = json.dumps({"instruction": "x", "output": answer}, ensure_ascii=False).replace("\\u000b", "\x0b")
    text = line.replace("\x0b", "\\u000b") + "\n" + json.dumps({"instruction": "x", "output": "second"})
    assert learnt(load(make_data(text, "x.jsonl")).train) == [answer, "second"]


def test_cells_of_a_csv_are_text(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    text = 'instruction,output\n1,42\nq,NA\nq,"two\nlines, ""quoted"""\nq,None\n'
    assert learnt(load(make_data(text, "x.csv")).train) == ["42", "NA", 'two\nlines, "quoted"', "None"]


def test_an_empty_cell_is_no_answer(make_data: MakeData, load: Load, learnt: Learnt, capsys: pytest.CaptureFixture[str]) -> None:
    assert learnt(load(make_data("instruction,output\na,\nb,yes\n", "x.csv")).train) == ["yes"]
    assert "'output' should be text, found nothing" in capsys.readouterr().err


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
        ('{"a": 1}\n{"b" 2}', "x.jsonl", r"x\.jsonl:2: this line is not JSON"),
        (b'[{"a": "\xff"}]', "x.json", "is not UTF-8"),
        (b"PAR1 and nothing", "x.parquet", "cannot be read as a parquet file"),
        ("hello", "x.docx", r"x\.docx should end in one of \.json"),
        ("", "x.json", "no row is left to train on"),
        ("[]", "x.json", "no row is left to train on"),
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
def test_val_size_splits_without_loss(size: float, count: int) -> None:
    samples = [Sample((), row=row) for row in range(20)]
    train, held_out = split(samples, size, 7)
    assert len(held_out) == count
    assert sorted(sample.row for sample in train + held_out) == list(range(20))
    assert (train, held_out) == split(samples, size, 7)
    assert [sample.row for sample in train] == sorted(sample.row for sample in train)
    assert any(split(samples, size, seed)[1] != held_out for seed in range(5))


def test_val_size_must_leave_something() -> None:
    with pytest.raises(UserError, match="'val_size' takes 20 of 20 samples"):
        split([Sample((), row=row) for row in range(20)], 20, 7)


def test_both_parts_of_a_split_are_encoded(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    sets = load(make_data(records(10)), val_size=0.3)
    assert sets.eval is not None
    assert (len(learnt(sets.train)), len(learnt(sets.eval))) == (7, 3)
    assert sorted(learnt(sets.train) + learnt(sets.eval)) == [f"answer {n}" for n in range(10)]
    assert load(make_data(records(10))).eval is None


def test_eval_dataset_is_a_set_of_its_own(make_data: MakeData, load: Load, learnt: Learnt) -> None:
    folder = make_data(records(4))
    sets = load(folder, dataset="", eval_dataset="x")
    assert sets.train is None
    assert learnt(sets.eval) == [f"answer {n}" for n in range(4)]


WHO = {"instruction": "I am {{name}}", "output": "{{name}} by {{author}}", "sys": "You are {{name}}"}


def test_placeholders_are_filled(
    make_data: MakeData, load: Load, learnt: Learnt, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_data([WHO], columns={"system": "sys"})
    sets = load(folder, placeholders={"name": "Ada", "author": "us"})
    assert learnt(sets.train) == ["Ada by us"]
    assert sets.train is not None
    assert "{{" not in tokenizer.decode(sets.train.ids)
    assert "still say" not in capsys.readouterr().err


def test_unfilled_placeholders_are_told(make_data: MakeData, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_data([WHO, *records(2)], columns={"system": "sys"})
    load(folder, placeholders={"name": "Ada"})
    told = capsys.readouterr().err
    assert "x: 1 samples still say {{author}}; set 'placeholders.author' to fill it in" in told
    assert "{{name}}" not in told


def test_records_left_out_are_counted_by_reason(
    make_data: MakeData, load: Load, learnt: Learnt, capsys: pytest.CaptureFixture[str]
) -> None:
    content: list[Any] = records(3)
    content[1:1] = [{"instruction": "a"}, "text", {"instruction": "b", "output": 7}, {"instruction": "c"}]
    assert learnt(load(make_data(content)).train) == THREE
    told = capsys.readouterr().err
    assert "x: 2 of 7 records left out (rows 1, 4, counted from 0): 'output' should be text, found nothing" in told
    assert "x: 1 of 7 records left out (rows 2, counted from 0): a record should be an object, found str" in told
    assert "x: 1 of 7 records left out (rows 3, counted from 0): 'output' should be text, found int" in told


def test_rows_of_drawn_records_are_those_of_the_file(make_data: MakeData, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    content = [*records(6), {"instruction": "a"}]
    load(make_data(content, num_samples=7))
    assert "1 of 7 records left out (rows 6, counted from 0)" in capsys.readouterr().err


def test_several_workers_encode_the_same(make_data: MakeData, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(0)
    content = [record | {"output": "word " * dice.randrange(9)} for record in records(200)]
    folder = make_data(content)
    alone = load(folder, preprocessing_num_workers=1, overwrite_cache=True, cutoff_len=24)
    assert "processes" not in capsys.readouterr().err
    together = load(folder, preprocessing_num_workers=3, overwrite_cache=True, cutoff_len=24)
    assert "encoding with 3 processes" in capsys.readouterr().err
    assert same(alone.train, together.train)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Every sample that is encoded, and not taken from the cache."""
    seen: list[Sample] = []
    encode = Chat.encode

    def watched(self: Chat, sample: Sample) -> Any:
        seen.append(sample)
        return encode(self, sample)

    monkeypatch.setattr(Chat, "encode", watched)
    return seen


def test_the_same_rows_are_encoded_once(
    make_data: MakeData,
    load: Load,
    encodings: list[Sample],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    folder = make_data(records(4))
    first = load(folder)
    assert "train: 4 samples, 4 rows" in capsys.readouterr().err
    second = load(folder)
    assert len(encodings) == 4
    assert "train: 4 samples, already encoded" in capsys.readouterr().err
    assert same(first.train, second.train)
    load(folder, overwrite_cache=True)
    assert len(encodings) == 8


@pytest.mark.parametrize("change", ["row", "cutoff_len", "key", "placeholders"])
def test_what_changes_the_tokens_is_encoded_anew(make_data: MakeData, load: Load, encodings: list[Sample], change: str) -> None:
    content = records(4)
    load(make_data(content))
    if change == "row":
        content[3]["output"] += "!"
    other = {"cutoff_len": {"cutoff_len": 99}, "key": {"key": "another"}, "placeholders": {"placeholders": {"say": "x"}}}.get(change, {})
    load(make_data(content), **other)
    # a placeholder that stands nowhere changes no token
    assert len(encodings) == (4 if change == "placeholders" else 8)


def test_another_template_has_another_key(tiny_model: Path, tmp_path: Path) -> None:
    """The session's digest of tokenizer and template is what `load_sets` is given as the key."""
    from transformers import AutoTokenizer

    from finery.training.session import Session

    keys = []
    for name in ("chatml", "qwen", "empty"):
        tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
        keys.append(Session.token_key(None, SlotTemplate.load(name, tokenizer), tokenizer))  # type: ignore[arg-type]
    assert len(set(keys)) == 3


def test_reasons_are_told_again_from_the_cache(make_data: MakeData, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_data([{"instruction": "long question " * 99, "output": "hm " * 9}, *records(1)])
    for _ in range(2):
        load(folder, cutoff_len=20)
        assert "train: 1 samples yield no row (x row 0): nothing of the answer is left within cutoff_len" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    make_data: MakeData, load: Load, learnt: Learnt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("FINERY_CACHE", str(blocked))
    assert learnt(load(make_data(records(3))).train) == THREE
    assert "warning: the encoded rows could not be kept" in capsys.readouterr().err


def test_nothing_left_after_cutting_is_an_error(make_data: MakeData, load: Load) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="no row is left to train on"):
            load(make_data(records(2)), cutoff_len=1)


def test_messages_reach_the_template_unchanged(make_data: MakeData, tokenizer: Any) -> None:
    """Load with a template that only keeps what it is given."""
    seen: list[Sample] = []

    class Watching(SlotTemplate):
        def encode(self, sample: Sample) -> Any:
            seen.append(sample)
            return super().encode(sample)

    template = Watching.load("empty", tokenizer)
    folder = make_data([{"instruction": "a", "input": "b", "output": "c", "sys": "s"}], columns={"system": "sys"})
    data = DataOptions.model_validate({"dataset": "x", "dataset_dir": folder})
    load_sets(data, Chat(template, 64), 7, {}, "watching")
    assert seen == [Sample((Message("user", "a\nb"), Message("assistant", "c")), "s", "", "x", 0)]
