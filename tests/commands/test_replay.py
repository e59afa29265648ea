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
