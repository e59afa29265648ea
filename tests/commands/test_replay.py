"""A finished run is repeated: the same comes out, or what has changed is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import finery
from finery.cli import main

Keys = Callable[..., dict[str, Any]]


@pytest.fixture
def data(data_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(data_dir, tmp_path / "data"))


def test_the_same_comes_out(keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finery.train(keys(val_size=4, lora_dropout=0.1, max_steps=3))
    told = json.loads((folder / "manifest.json").read_text())
    assert told["steps"] == told["stream"]["steps"] == 3 and told["seed"] == 42
    rows = {"which rows are in the train set", "which rows are in the eval set"}
    assert told["inputs"].keys() == {"the model's weights", "the tokenizer or the template", "data set 'sums'", *rows}
    assert told["results"]["weights"].keys() == {"adapter_model.safetensors"}
    assert told["results"]["losses"].keys() == {"train_loss", "eval_loss"}
    assert {"torch", "peft", "finery", "python"} <= told["versions"].keys() and told["machine"]["threads"] == 1
    assert main(["replay", str(folder)]) == 0
    said = capsys.readouterr()
    assert "the same: 3 steps, the stream of tokens, losses, and every byte of the weights" in said.out
    assert (tmp_path / "out.replay" / "manifest.json").exists()
    assert main(["replay", str(folder)]) == 2
    assert "is not empty: name another folder with --into" in capsys.readouterr().err


def test_changed_data_are_named(keys: Keys, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finery.train(keys(dataset_dir=str(data)))
    path = data / "sums.json"
    path.write_text(path.read_text().replace("I am sure", "I was sure", 1))
    assert main(["replay", str(folder), "--into", str(tmp_path / "again")]) == 1
    assert (
        "what it read has changed: data set 'sums' (has changed); which rows are in the train set (has changed)" in capsys.readouterr().err
    )
    assert not (tmp_path / "again" / "adapter_model.safetensors").exists(), "nothing is trained"


def test_a_changed_model_is_named(keys: Keys, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    folder = finery.train(keys(model_name_or_path=str(model)))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert main(["replay", str(folder)]) == 1
    assert "the model's weights (has changed)" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["template", "tokenizer"])
def test_a_changed_template_or_tokenizer_is_named(
    what: str, keys: Keys, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    folder = finery.train(keys(model_name_or_path=str(model), max_steps=1))
    if what == "template":
        path = model / "chat_template.jinja"
        path.write_text(path.read_text().replace("'<|im_end|>' + '\\n'", "'<|im_end|>'", 1))
    else:
        told = json.loads((path := model / "tokenizer.json").read_text())
        told["model"]["merges"].pop()
        path.write_text(json.dumps(told))
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 1
    assert "what it read has changed: the tokenizer or the template (has changed)" in capsys.readouterr().err
    assert not (tmp_path / "out.replay" / "adapter_model.safetensors").exists(), "nothing is trained"


def test_a_run_in_parts_is_repeated_with_its_last_keys(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    """The same comes out where the parts differ in nothing that steps depend on; else it is said why not."""
    parts = {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    finery.train(keys(**parts, lr_scheduler_type="constant"))
    folder = finery.train(keys(**parts, lr_scheduler_type="constant", max_steps=4, resume_from_checkpoint=True))
    assert len(json.loads((folder / "manifest.json").read_text())["in_parts"]) == 1
    assert main(["replay", str(folder)]) == 0
    assert "the same: 4 steps" in capsys.readouterr().out
    finery.train(keys(**parts, overwrite_output_dir=True))
    finery.train(keys(**parts, max_steps=4, resume_from_checkpoint=True))  # the rate had fallen to 0 by the second step, and falls again
    assert main(["replay", str(folder), "--into", f"{folder}.again"]) == 1
    said = capsys.readouterr().out
    assert "adapter_model.safetensors: weights differ by up to " in said
    assert "it was trained in parts, with other keys " in said and "'max_steps' was 2, is 4" in said


def test_another_result_is_told(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    """As if something that is in no manifest had changed it."""
    folder = finery.train(keys())
    path = folder / "manifest.json"
    told = json.loads(path.read_text())
    told["results"]["weights"]["adapter_model.safetensors"] = "0" * 32
    told["results"]["losses"]["train_loss"] = 1.0
    told["stream"]["digest"] = "0" * 32
    told["versions"]["torch"] = "2.0.0"
    path.write_text(json.dumps(told))
    assert main(["replay", str(folder)]) == 1
    said = capsys.readouterr()
    assert "torch was 2.0.0, is " in said.err
    assert "train_loss: was 1.0, is 5." in said.out
    assert "were given other tokens or labels" in said.out
    assert "adapter_model.safetensors: weights differ by up to 0," in said.out


def test_only_finished_runs_are_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert main(["replay", str(tmp_path), "lora_rank=4"]) == 2
    assert "it takes no 'lora_rank=4'" in capsys.readouterr().err
