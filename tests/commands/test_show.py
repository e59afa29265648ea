"""What `finery show` prints is what the loop trains on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finery.cli import main
from finery.commands.train import train
from finery.data.rows.base import Row
from finery.run import Run
from finery.training.trainer import Trainer

Keys = Callable[..., dict[str, Any]]


@pytest.fixture
def mixed(tmp_path: Path) -> dict[str, Any]:
    """Keys of two data sets in one run: alpaca rows, and conversations of one to four rounds, some of them broken or long."""
    chats = [
        {"conversations": [{"from": who, "value": f"{who} says {word} {k}"} for k in range(n % 4 + 1) for who in ("human", "gpt")]}
        for n, word in enumerate(["one", "two", "three", "four", "five", "six " * 30] * 3)
    ]
    chats[4]["conversations"] = chats[4]["conversations"][:-1]  # ends with a question
    sums = [{"instruction": f"What is {n} plus {n}?", "input": "", "output": f"It is {2 * n}." * (n % 5 + 1)} for n in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (tmp_path / "sums.json").write_text(json.dumps(sums))
    entries = {"chats": {"file_name": "chats.jsonl", "formatting": "sharegpt"}, "sums": {"file_name": "sums.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    return {"dataset": "sums,chats", "dataset_dir": str(tmp_path), "cutoff_len": 60, "max_steps": 3}


@pytest.fixture
def words(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """A config file with these keys."""

    def write(keys: dict[str, Any]) -> str:
        path = tmp_path / "run.json"
        path.write_text(json.dumps(keys))
        return str(path)

    return write


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """The objects that `finery show --json` prints."""
    capsys.readouterr()
    assert main(["show", *words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def as_bytes(ids: Any, labels: Any, positions: Any) -> bytes:
    return b"|".join(np.asarray(values, np.int32).tobytes() for values in (ids, labels, positions))


def of_object(one: dict[str, Any]) -> bytes:
    return as_bytes(one["input_ids"], one["labels"], one["position_ids"])


def of_row(row: Row) -> bytes:
    return as_bytes(row.ids, row.labels, np.arange(len(row.ids)) if row.positions is None else row.positions)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Row]]]:
    """What each call of `training_step` receives."""
    received: list[list[Row]] = []
    step = Trainer.training_step

    def watched(self: Trainer, model: Any, inputs: Any, *rest: Any) -> Any:
        received.append(list(inputs))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", watched)
    yield received


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "in order": {"disable_shuffling": True},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "last answers": {"mask_history": True},
    "prompts": {"train_on_prompt": True},
    "named template": {"template": "chatml"},
    "split rows": {"truncation": "split", "cutoff_len": 30},
    "held out": {"val_size": 0.2},
    "in turn": {"mix_strategy": "interleave_over", "interleave_probs": [0.3, 0.7]},
    "packs": {"packing": True},
    "packs whose rows see each other": {"packing_contaminated": True},
    "blocks": {"stage": "pt", "dataset": "sums", "max_samples": 20},
    "texts": {"stage": "pt", "dataset": "sums", "packing": False},
}


@pytest.mark.parametrize("case", CASES)
def test_shown_is_trained(
    case: str, keys: Keys, mixed: dict[str, Any], words: Any, trained: list[list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte: the steps as they are dealt, and each row that a step holds among the rows in the files' order."""
    settings = keys(**{**mixed, **CASES[case]})
    train(Run.from_dict(settings, trains=True))
    assert len(trained) == 3
    file = words(settings)
    for number, rows in enumerate(trained, 1):
        assert [of_object(one) for one in shown(capsys, file, "--step", str(number))] == [of_row(row) for row in rows]
    if case not in ("packs whose rows see each other", "blocks"):  # there a row of a step is no row of a file
        known = {piece for one in shown(capsys, file) for piece in segments(one)}
        assert {of_row(row) for rows in trained for row in rows} <= known


def segments(one: dict[str, Any]) -> Iterator[bytes]:
    """Each of an object's rows."""
    numbers = np.asarray(one["segments"])
    for number in range(max(one["segments"], default=-1) + 1):
        yield as_bytes(*(np.asarray(one[key])[numbers == number] for key in ("input_ids", "labels", "position_ids")))


def test_every_row_is_shown_in_the_order_of_the_files(
    keys: Keys, mixed: dict[str, Any], words: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that are held out, and those that are left out, with their reason."""
    found = shown(capsys, words(keys(**mixed, val_size=5)))
    assert [(one["dataset"], one["row"]) for one in found] == [("sums", n) for n in range(20)] + [("chats", n) for n in range(18)]
    assert {one["set"] for one in found} == {"train", "eval"}
    broken = next(one for one in found if one["dataset"] == "chats" and one["row"] == 4)
    assert broken["input_ids"] == broken["labels"] == broken["position_ids"] == broken["segments"] == []
    assert "ends with a question" in broken["reason"]
    whole = next(one for one in found if one["dataset"] == "sums" and one["row"] == 0)
    assert whole["text"] == "<|im_start|>user\nWhat is 0 plus 0?<|im_end|>\n<|im_start|>assistant\nIt is 0.<|im_end|>\n"
    assert whole["cut"] == 0 and whole["reason"] == ""
    assert all(one["cut"] > 0 for one in found if one["dataset"] == "chats" and one["row"] % 6 == 5)


def test_rows_are_chosen(keys: Keys, mixed: dict[str, Any], words: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """By data set, row and number; what there is not is one message."""
    file = words(keys(**mixed))
    assert [one["row"] for one in shown(capsys, file, "--dataset", "chats", "--row", "3")] == [3]
    assert [one["row"] for one in shown(capsys, file, "--dataset", "chats", "--num", "2")] == [0, 1]
    for wrong, said in (
        (["--dataset", "chat"], "no data set 'chat'; did you mean 'chats'?"),
        (["--row", "99"], "no set of this run takes row 99 of sums, chats"),
        (["--step", "0"], "this run does 3 steps, counted from 1, found 0"),
        (["--num", "0"], "--num should be 1 or more"),
        (["--step", "1", "--row", "2"], "leave out --row"),
    ):
        assert main(["show", file, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_terminal_and_page(keys: Keys, mixed: dict[str, Any], words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both name rows, cuts and reasons; the page needs nothing beside it."""
    file = words(keys(**mixed))
    assert main(["show", file, "--dataset", "chats", "--num", "6"]) == 0
    out = capsys.readouterr().out
    assert "chats row 0 (train)" in out and "tokens cut away" in out and "left out: " in out
    page = tmp_path / "rows.html"
    assert main(["show", file, "--html", str(page), "--num", "30"]) == 0
    text = page.read_text()
    assert text.count("<article>") == 30 and '<span class="learnt">' in text and '<span class="mark">' in text
    assert 'name="viewport"' in text and "src=" not in text and "href=" not in text and "&lt;|im_end|&gt;" in text
    assert main(["show", file, "--html", str(tmp_path / "no" / "rows.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
