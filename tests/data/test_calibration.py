"""Texts by which a quantizer measures a model: documents of any length become windows of tokens."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import CHATML
from finery.data.calibration import Corpus, calibration, windows
from finery.data.sample import Message, Sample
from finery.errors import UserError
from finery.exports.gptq import conversation


def documents(*lengths: int) -> Iterator[list[int]]:
    """Documents of so many tokens; a token tells its document and its place."""
    return ([1000 * number + place for place in range(length)] for number, length in enumerate(lengths))


def test_short_documents_are_joined() -> None:
    found = windows(documents(3, 4, 5, 2), 10, 6, random.Random(0))
    assert found == [[0, 1, 2, 1000, 1001, 1002], [1003, 2000, 2001, 2002, 2003, 2004], [3000, 3001]]


def test_a_long_document_gives_one_window_before_the_rest_of_it_counts() -> None:
    first = windows(documents(100, 100, 100), 3, 10, random.Random(1))
    assert [ids[0] // 1000 for ids in first] == [0, 1, 2] and all(ids == list(range(ids[0], ids[0] + 10)) for ids in first)
    every = windows(documents(100, 100, 100), 50, 10, random.Random(1))
    assert len(every) == 30 and sorted(id for ids in every for id in ids) == sorted(id for ids in documents(100, 100, 100) for id in ids)
    assert windows(documents(100, 100, 100), 3, 10, random.Random(2)) != first


def test_no_more_documents_are_read_than_are_needed() -> None:
    read: list[int] = []

    def counted() -> Iterator[list[int]]:
        for ids in documents(*[8] * 100):
            read.append(len(ids))
            yield ids

    assert len(windows(counted(), 2, 10, random.Random(0))) == 2 and len(read) == 3


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_model))


def plain(sample: Sample) -> str:
    return " | ".join(message.content for message in sample.messages)


TEXTS = [f"The quick brown fox number {number} jumps over {number} lazy dogs." for number in range(30)]


def written(folder: Path, kind: str) -> Path:
    """The texts as a file of a kind."""
    import pyarrow
    from pyarrow import parquet

    path = folder / f"texts.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": TEXTS, "id": list(range(30))}), path)
        return path
    lines = {
        "json": json.dumps([{"text": text, "label": True} for text in TEXTS]),
        "jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS),
        "csv": "\n".join(["id,text", *(f"{number},{text}" for number, text in enumerate(TEXTS))]),
        "txt": "\n\n".join(TEXTS),
    }
    path.write_text(lines[kind], encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "txt", "parquet"])
def test_files_of_every_kind_give_the_same_texts(tmp_path: Path, tokenizer: Any, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = Corpus(str(written(tmp_path, kind)), "data", {}, 3)
    found = calibration(corpus, tokenizer, plain, 1000, 50)
    words = {text for ids in found for text in tokenizer.decode(ids).split("<|im_end|>") if text in TEXTS}
    assert len(words) > 15 and all(len(ids) == 50 for ids in found[:-1])
    said = capsys.readouterr().err
    assert f"calibration: {len(found)} windows of" in said and "of the " in said and "1000 were asked for" in said


def test_windows_are_drawn_by_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    path = str(written(tmp_path, "jsonl"))
    draws = [calibration(Corpus(path, "data", {}, seed), tokenizer, plain, 4, 20) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and [len(ids) for ids in draws[0]] == [20] * 4


def test_a_window_begins_as_a_text_does(tmp_path: Path) -> None:
    class Marked:
        """A tokenizer that puts token 1 before every text."""

        eos_token_id = 2

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = [10 + ord(letter) for letter in text]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    found = calibration(Corpus(str(written(tmp_path, "jsonl")), "data", {}, 0), Marked(), plain, 5, 16)
    assert all(len(ids) == 16 and ids[0] == 1 and 1 not in ids[1:] for ids in found)


def test_conversations_are_read_as_the_model_reads_them(data_dir: Path, tokenizer: Any) -> None:
    corpus = Corpus("sums", str(data_dir), {}, 0)
    (ids, *_) = calibration(corpus, tokenizer, lambda sample: conversation(sample, tokenizer, CHATML), 2, 400)
    assert "<|im_start|>user\nWhat is" in tokenizer.decode(ids) and "<|im_start|>assistant\n" in tokenizer.decode(ids)
    sample = Sample((Message("user", "Hi"), Message("assistant", "Hello")), system="Be brief.")
    assert conversation(sample, tokenizer, None) == "Be brief.\n\nHi\n\nHello"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.jsonl", "", "is empty"),
        ("blank.json", '[{"text": ""}, {"text": "  "}]', "holds no text to calibrate with: blank.json row"),
        ("gone.jsonl", None, "there is no such file or folder"),
        ("summs", None, "did you mean 'sums'?"),
        ("strange.json", '[{"colour": 3}]', "the format cannot be told"),
    ],
)
def test_texts_that_are_not_there(tmp_path: Path, data_dir: Path, tokenizer: Any, name: str, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
        name = str(tmp_path / name)
    with pytest.raises(UserError) as caught:
        calibration(Corpus(name, str(data_dir), {}, 0), tokenizer, plain, 4, 20)
    assert told in str(caught.value) and len(caught.value.complaints) == 1


def test_a_name_with_a_slash_is_a_hub_s(tmp_path: Path, data_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(name: str, **how: Any) -> Path:
        asked.append(name)
        written(tmp_path, "parquet")
        return tmp_path

    monkeypatch.setattr("finery.data.files.fetch", fetch)
    assert len(calibration(Corpus("somebody/texts", str(data_dir), {}, 0), tokenizer, plain, 4, 20)) == 4
    assert asked == ["somebody/texts"]
