"""`finery expand` adds layers that change nothing; only those are trained then."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import build_model
from finery.cli import main
from finery.commands.train import train
from finery.models.load import load_model
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
IDS = torch.tensor([[5, 9, 40, 77, 3, 120]])


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load_model(folder, torch.float32, False).eval()(IDS).logits


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four layers, two were added: the third and the sixth of six are the new ones."""
    folder = tmp_path_factory.mktemp("expanded")
    base = build_model(folder / "base", num_hidden_layers=4, attention_bias=True)
    assert main(["expand", str(base), str(folder / "more"), "--blocks", "2"]) == 0
    return folder / "more"


def numbers(names: set[str]) -> set[int]:
    """The layers that weights belong to; -1 for those outside."""
    return {int(name.split("layers.")[1].split(".")[0]) if "layers." in name else -1 for name in names}


def test_computes_the_same(expanded: Path) -> None:
    assert torch.equal(logits(expanded), logits(expanded.with_name("base")))
    config = json.loads((expanded / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    weights = load_file(expanded / "model.safetensors")
    silent = {name for name, weight in weights.items() if ("o_proj" in name or "down_proj" in name) and not weight.any()}
    assert numbers({name for name in silent if name.endswith("weight")}) == {2, 5}


def test_layers_of_several_kinds_keep_theirs() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from finery.models.expansion import expand

    kinds = ["full_attention", "sliding_attention"] * 2
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 128,
    }
    config = Qwen3Config(**sizes, num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    model: Any = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        before = model(IDS).logits
        expand(model, 4)
        assert torch.equal(model(IDS, use_cache=False).logits, before)
    assert model.config.layer_types == [kind for kind in kinds for _ in range(2)]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(8))
    greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **greedy, use_cache=True), model.generate(IDS, **greedy, use_cache=False))


@pytest.mark.parametrize("finetuning_type", ["freeze", "lora"])
def test_only_added_layers_are_trained(finetuning_type: str, expanded: Path, keys: Keys) -> None:
    names = keys(model_name_or_path=str(expanded), finetuning_type=finetuning_type, use_llama_pro=True, freeze_trainable_layers=2)
    folder = train(Run.from_dict(names))
    if finetuning_type == "lora":
        assert numbers(set(load_file(folder / "adapter_model.safetensors"))) == {2, 5}
    else:
        before, after = (load_file(place / "model.safetensors") for place in (expanded, folder))
        assert numbers({name for name in before if not torch.equal(before[name], after[name])}) == {2, 5}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["{base}", "{new}", "--blocks", "3"], "--blocks should divide the 4 layers of the model (1, 2, 4), found 3"),
        (["{base}", "{new}", "--blocks", "0"], "--blocks should divide the 4 layers of the model (1, 2, 4), found 0"),
        (["{base}", "{base}", "--blocks", "2"], "is there already: name a new folder"),
        (["{base}", "{new}", "--blocks", "2", "more"], "finery expand takes MODEL, OUT and --blocks, and not 'more'"),
    ],
)
def test_what_cannot_be(words: list[str], text: str, expanded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"{base}": str(expanded.with_name("base")), "{new}": str(tmp_path / "new")}
    assert main(["expand", *(places.get(word, word) for word in words)]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_added_layers_must_be_a_part_of_all(expanded: Path, keys: Keys) -> None:
    from finery.errors import UserError

    names = keys(model_name_or_path=str(expanded), finetuning_type="freeze", use_llama_pro=True, freeze_trainable_layers=4)
    with pytest.raises(UserError, match="must divide all 6"):
        train(Run.from_dict(names))
