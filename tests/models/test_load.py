"""What is said of folders that hold no model, or one that brings its own code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finery.commands.chat import open_engine
from finery.commands.export import export
from finery.commands.train import train
from finery.errors import UserError
from finery.models.load import load_model
from finery.models.tokenizer import load_tokenizer
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
COMMANDS = {"train": train, "chat": open_engine, "export": export}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def complaint(work: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_tokenizer(command: str, model: Path, keys: Keys) -> None:
    remove(model, "token*", "chat_template*")
    text = complaint(lambda: COMMANDS[command](Run.from_dict(keys(model_name_or_path=str(model)))))
    assert text.startswith(f"{model} holds no tokenizer that can be loaded")


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_weights(command: str, model: Path, keys: Keys) -> None:
    remove(model, "*.safetensors")
    text = complaint(lambda: COMMANDS[command](Run.from_dict(keys(model_name_or_path=str(model)))))
    assert text.startswith(f"{model} holds no causal language model that can be loaded")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_folder(command: str, tmp_path: Path, keys: Keys) -> None:
    (tmp_path / "empty").mkdir()
    text = complaint(lambda: COMMANDS[command](Run.from_dict(keys(model_name_or_path=str(tmp_path / "empty")))))
    assert str(tmp_path / "empty") in text


@pytest.mark.parametrize("command", COMMANDS)
def test_no_folder(command: str, tmp_path: Path, keys: Keys) -> None:
    text = complaint(lambda: COMMANDS[command](Run.from_dict(keys(model_name_or_path=str(tmp_path / "nowhere")))))
    assert f"there is no folder {tmp_path / 'nowhere'}" in text


def test_missing_config(model: Path) -> None:
    remove(model, "config.json")
    text = complaint(lambda: load_model(model, torch.float32, False))
    assert text.startswith(f"{model} holds no causal language model that can be loaded")


def test_a_model_type_nobody_knows(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "tomorrow", "architectures": ["Tomorrow"]}))
    text = complaint(lambda: load_model(model, torch.float32, False))
    assert text.startswith(f"{model} holds no causal language model that can be loaded: ") and "tomorrow" in text


def test_a_model_that_writes_no_text(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    text = complaint(lambda: load_model(model, torch.float32, False))
    assert text.startswith(f"{model} holds no causal language model that can be loaded: ")


def test_broken_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"no weights at all")
    text = complaint(lambda: load_model(model, torch.float32, False))
    assert text.startswith(f"{model / 'model.safetensors'} cannot be read as safetensors: ")


def test_a_missing_shard(tiny_model: Path, model: Path) -> None:
    remove(model, "*.safetensors")
    load_model(tiny_model, torch.float32, False).save_pretrained(str(model), max_shard_size=60_000)
    shards = sorted(model.glob("*.safetensors"))
    shards[1].unlink()
    text = complaint(lambda: load_model(model, torch.float32, False))
    assert text.startswith(f"{model} holds no causal language model that can be loaded: ")


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"intermediate_size": 80}, "model.layers.0.mlp.down_proj.weight and 5 more"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight and 8 more"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config(change: dict[str, Any], lacking: str, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    text = complaint(lambda: load_model(model, torch.float32, False))
    assert text == f"{model} holds no weights that fit its config.json for {lacking}"


@pytest.mark.parametrize("command", COMMANDS)
def test_remote_code_is_refused(command: str, model: Path, keys: Keys) -> None:
    ran = model / "ran"
    (model / "foreign.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "foreign.C", "AutoModelForCausalLM": "foreign.M"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "foreign", "auto_map": auto}))
    text = complaint(lambda: COMMANDS[command](Run.from_dict(keys(model_name_or_path=str(model)))))
    assert text == f"{model} brings its own code; set 'trust_remote_code: true' if you trust it"
    assert not ran.exists()


def test_a_tokenizer_pads_on_the_right(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, False)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|endoftext|>")


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(model: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(model, False).pad_token == "<|im_end|>"
