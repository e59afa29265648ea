"""The gate before weights are loaded: what it proves, what it tells, and that a fault stops a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finery.checks import template as gate
from finery.cli import main
from finery.data.proof import Fault, Proof, Proved

Keys = Callable[..., dict[str, Any]]
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
RECORDS = [
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]},
    {"messages": [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "An end."}]},
    {"messages": [{"role": "user", "content": "And <|im_start|>?"}, {"role": "assistant", "content": "A beginning."}]},
    {"messages": [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
]


@pytest.fixture
def words(keys: Keys, tmp_path: Path) -> list[str]:
    """A run of one step on four conversations, one of which the template refuses."""
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return [f"{key}={value}" for key, value in keys(dataset=str(tmp_path / "x.jsonl"), max_steps=1).items()]


def found(fault: Fault) -> Callable[[Proof, Any], Proved]:
    return lambda self, sample: Proved("row", "", (fault,))


def test_what_is_proved_and_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 0
    said = capsys.readouterr().err
    assert (
        "the model's own template: proved that 3 of 4 drawn rows are trained as they are served, and the hard conversations, but for "
        in said
    )
    assert "'two calls at once'" in said
    assert said.count("text here, in training and serving; other servers read tokens") == 1, "each kind is told once"


def test_a_fault_stops_the_run_before_weights_are_loaded(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Proof, "of", found(Fault("answers are cursed", kind="curse")))
    monkeypatch.setattr("finery.models.load.load_model", None)
    assert main(["train", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: 'template': on 'no system text', answers are cursed; choose another 'template'")
    assert main(["check", *words]) == 2
    said = capsys.readouterr().out
    assert said.count("on 'no system text', answers are cursed") == 1, "a kind is told once of the hard conversations"
    assert "x.jsonl:0: answers are cursed; choose another 'template'" in said
    assert "4 rows: 0, 1, 2, …; stops the run" in said
    assert said.splitlines()[-1].endswith("; a run cannot begin with this")


def test_other_stages_prove_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "prepared", None)
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"text": "One and two."}))
    assert main(["train", *words, "stage=pt", f"dataset={text}"]) == 0
    assert main(["check", *words, "stage=pt", f"dataset={text}"]) == 0
    assert "template" not in capsys.readouterr().out


def test_only_the_first_process_proves(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "is_first", lambda: False)
    monkeypatch.setattr(gate, "prepared", None)
    assert main(["train", *words]) == 0


def test_so_many_rows_are_drawn(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "NUM_DRAWN", 2)
    assert main(["train", *words]) == 0
    assert "of 2 drawn rows" in capsys.readouterr().err


def test_a_folder_that_cannot_be_loaded_again(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "save_tokenizer", lambda tokenizer, folder, jinja: (folder / "x").touch())
    assert main(["train", *words]) == 2
    assert "error: what is saved could not be loaded again: " in capsys.readouterr().err


def test_the_model_s_own_generation_config_is_what_is_saved(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(model: Any, folder: Path, stop_ids: frozenset[int]) -> None:
        model.generation_config.eos_token_id = 1
        model.generation_config.save_pretrained(folder)

    monkeypatch.setattr(gate, "save_stop_tokens", forgetful)
    assert main(["train", *words]) == 2
    assert "'template': answers end at the tokens [2], the saved generation config says 1" in capsys.readouterr().err
