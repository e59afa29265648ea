"""Rows are encoded once: what is remembered, what makes them new, and by how many processes."""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finery.data import ledger
from finery.data.encoder import CHUNK
from finery.data.jinja import JinjaTemplate
from finery.data.load import Sets
from finery.data.rows.base import Row, RowOptions
from finery.data.rows.chat import Chat
from finery.errors import UserError
from named import named

Load = Callable[..., Sets]
RowsOf = Callable[[Any], list[Row]]
MakeData = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for every test."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))


def records(count: int) -> list[dict[str, str]]:
    """Numbered alpaca records."""
    return [{"instruction": f"say {n}", "input": "", "output": f"answer {n}"} for n in range(count)]


@pytest.fixture
def encode(load: Load, rows_of: RowsOf) -> Callable[..., tuple[list[Row], int]]:
    """The training rows of a folder, and how many samples were encoded for that."""

    def run(folder: str, **options: Any) -> tuple[list[Row], int]:
        sets = load(folder, **options)
        rows = rows_of(sets.train)
        sets.stop()
        assert sets.encoder is not None
        return rows, sets.encoder.num_done()

    return run


Encode = Callable[..., tuple[list[Row], int]]


def same(one: list[Row], other: list[Row]) -> bool:
    """Whether these are the same rows."""
    pairs = list(zip(one, other, strict=True))
    return bool(pairs) and all(np.array_equal(a.ids, b.ids) and np.array_equal(a.labels, b.labels) for a, b in pairs)


def test_the_same_rows_are_encoded_once(make_data: MakeData, encode: Encode) -> None:
    folder = make_data(records(4))
    first, num_first = encode(folder)
    second, num_second = encode(folder)
    assert (num_first, num_second) == (4, 0)
    assert same(first, second)
    third, num_third = encode(folder, overwrite_cache=True)
    assert num_third == 4
    assert same(first, third)


def test_a_copy_of_a_file_is_the_same_file(make_data: MakeData, encode: Encode, tmp_path: Path) -> None:
    folder = make_data(records(4))
    encode(folder)
    (tmp_path / "y.json").write_text((tmp_path / "x.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "y.json"}}))
    assert encode(folder)[1] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"row": True},
        {"cutoff_len": 99},
        {"key": "another"},
        {"placeholders": {"say": "x"}},
        {"mask_history": True},
        {"train_on_prompt": True},
        {"truncation": "drop"},
        {"entry": {"columns": {"response": "instruction"}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_tokens_is_encoded_anew(make_data: MakeData, encode: Encode, change: dict[str, Any]) -> None:
    content = records(4)
    encode(make_data(content))
    if change.pop("row", False):
        content[3]["output"] += "!"
    folder = make_data(content, **change.pop("entry", {}))
    assert encode(folder, **change)[1] == 4
    assert encode(folder, **change)[1] == 0


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"max_samples": 3}, {"val_size": 2}, {"packing": True}], ids=lambda change: next(iter(change))
)
def test_what_only_chooses_rows_encodes_nothing_anew(make_data: MakeData, encode: Encode, change: dict[str, Any]) -> None:
    folder = make_data(records(4))
    encode(folder)
    assert encode(folder, **change)[1] == 0


def test_another_template_has_another_key(tiny_model: Path) -> None:
    """The digest of tokenizer and template is what `load_sets` is given as the key."""
    from transformers import AutoTokenizer

    from finery.training.preparation import token_key

    def key(name: str | None = None, before: str = "", bos: str = "<|im_start|>", several: bool = False) -> str:
        tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
        tokenizer.bos_token = bos  # which a template may write
        own = before + tokenizer.chat_template
        tokenizer.chat_template = {"default": own, "tool_use": own} if several else own
        template = named(name, tokenizer) if name else JinjaTemplate(tokenizer)
        return token_key(Chat(template, RowOptions(cutoff_len=64)))

    found = [key(name) for name in ("chatml", "qwen", "empty")]
    found += [key(), key(before="X"), key(several=True), key(before="X", several=True), key(bos="<|endoftext|>")]
    assert len(set(found)) == len(found)
    assert key() == key()


def test_reasons_are_told_again_from_the_cache(make_data: MakeData, load: Load, rows_of: RowsOf) -> None:
    folder = make_data([{"instruction": "long question " * 99, "output": "hm " * 9}, *records(1)], "x.jsonl")
    (Path(folder) / "x.jsonl").write_text("\n".join(map(json.dumps, json.loads((Path(folder) / "x.jsonl").read_text()))))
    for _ in range(2):
        sets = load(folder, cutoff_len=20)
        assert len(rows_of(sets.train)) == 1
        told = ledger.table(ledger.report(sets.by_name))
        assert "train: x: 1 left out: longer than cutoff_len 20: nothing of the answer is left (x.jsonl row 0)" in told


def test_nothing_left_after_cutting_is_an_error(make_data: MakeData, load: Load) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=r"no row is left to train on: none of the 2 samples .* nothing of the answer is left"):
            load(make_data(records(2)), cutoff_len=1)


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    make_data: MakeData, encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "blocked"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert len(encode(make_data(records(3)))[0]) == 3
    assert "blocked cannot be used (File exists)" in (told := capsys.readouterr().err)
    assert "FINERY_CACHE names another folder" in told
    assert list((tmp_path / "temporary").rglob("index.bin"))


def test_several_workers_encode_the_same(make_data: MakeData, load: Load, rows_of: RowsOf) -> None:
    dice = random.Random(0)
    folder = make_data([record | {"output": "word " * dice.randrange(1, 9)} for record in records(300)])
    found = []
    for count in (1, 3):
        sets = load(folder, preprocessing_num_workers=count, overwrite_cache=True, cutoff_len=24)
        found.append(rows_of(sets.train))
        sets.stop()
        assert sets.encoder is not None
        shares = list(sets.encoder.shared.done)
        assert len(shares) == count
        assert 300 <= sum(shares) < 300 + CHUNK  # at most the chunk that goes over the end meets what is being encoded
        assert all(shares), "each has its part"
    assert same(*found)


def test_encoded_first_and_encoded_beside_give_the_same_rows(make_data: MakeData, load: Load, rows_of: RowsOf, tmp_path: Path) -> None:
    folder = make_data(records(200))
    beside = rows_of(load(folder).train)
    first = load(folder, tokenized_path=str(tmp_path / "tokens"))
    assert first.encoder is not None
    assert 200 <= first.encoder.num_done() < 200 + CHUNK, "all of it, before anything is trained"
    assert same(beside, rows_of(first.train))
    again = load(folder, tokenized_path=str(tmp_path / "tokens"))
    assert again.encoder is not None
    assert again.encoder.num_done() == 0
    with pytest.raises(UserError, match=r"was written with other settings: cutoff_len was 2048, is 99"):
        load(folder, tokenized_path=str(tmp_path / "tokens"), cutoff_len=99)
