"""What each adapter trains, saves and merges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import build_model
from finery.commands.train import train
from finery.errors import UserError
from finery.models.adapters import ADAPTERS
from finery.models.adapters.base import AdapterOptions
from finery.models.adapters.lora import LoRA
from finery.models.load import load_model, locate_adapters
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.tensor([[5, 9, 40, 77, 3, 120]])


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load_model(tiny_model, torch.float32, False)


def lora(**options: Any) -> LoRA:
    shared = {key: options.pop(key) for key in AdapterOptions.model_fields if key in options}
    return LoRA(LoRA.Options(**options), AdapterOptions(**shared))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def wrapped(model: Any) -> set[str]:
    """The last names of the layers that have an adapter."""
    return {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_A." in name}


def complaint(work: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


def trained_adapter(keys: Keys, name: str, **changes: Any) -> Path:
    """The folder of a short run with a high learning rate, so that the adapter says something."""
    folder = Path(keys()["output_dir"]).with_name(name)
    return train(Run.from_dict(keys(output_dir=str(folder), learning_rate=0.02, **changes)))


# ------------------------------------------------------------------ lora


def test_all_linear_layers_but_the_head(model: Any) -> None:
    assert wrapped(lora().apply(model)) == LINEAR


def test_targets_by_name(model: Any) -> None:
    assert wrapped(lora(lora_target="q_proj, down_proj").apply(model)) == {"q_proj", "down_proj"}


def test_targets_by_path(model: Any) -> None:
    tuned = lora(lora_target=["layers.1.mlp.up_proj"]).apply(model)
    assert {name.partition("base_model.model.")[2] for name, weight in tuned.named_parameters() if weight.requires_grad} == {
        "model.layers.1.mlp.up_proj.lora_A.default.weight",
        "model.layers.1.mlp.up_proj.lora_B.default.weight",
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lora_target": "q_porj"}, "'lora_target': the model has no linear layer 'q_porj'; did you mean 'q_proj'?"),
        (
            {"lora_target": "attention"},
            "'lora_target': the model has no linear layer 'attention'; there are: down_proj, gate_proj,",
        ),
        ({"additional_target": "embed_token"}, "'additional_target': the model has no module 'embed_token'; did you mean 'embed_tokens'?"),
    ],
)
def test_unknown_names(options: dict[str, Any], text: str, model: Any) -> None:
    assert complaint(lambda: lora(**options).apply(model)).startswith(text)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (0, 2.0), (4, 1.0)])
def test_rank_and_alpha(alpha: int | None, scale: float, model: Any) -> None:
    layer = lora(lora_rank=4, lora_alpha=alpha).apply(model).get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert layer.scaling["default"] == scale


def test_alpha_is_told_where_it_follows_from_the_rank() -> None:
    assert lora(lora_rank=4).decided() == {"lora_alpha": (8, "twice lora_rank")}
    assert lora(lora_alpha=5).decided() == {}


def test_dropout_changes_the_training_loss_alone(model: Any) -> None:
    tuned = lora(lora_dropout=0.5).apply(model)
    for name, weight in tuned.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.1)
    calm = logits(tuned)
    assert torch.equal(calm, logits(tuned))
    with torch.no_grad():
        assert not torch.allclose(tuned.train()(IDS).logits, calm, atol=1e-3)


def test_additional_target_is_trained_and_saved_with_the_adapter(keys: Keys, tiny_model: Path) -> None:
    folder = trained_adapter(keys, "extra", additional_target="norm")
    saved = load_file(folder / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    base = load_file(tiny_model / "model.safetensors")["model.norm.weight"]
    assert not torch.equal(saved, base)
    assert torch.equal(lora().merge(load_model(tiny_model, torch.float32, False), [folder]).model.norm.weight, saved)


def test_merged_is_what_the_adapter_computes(keys: Keys, tiny_model: Path, model: Any) -> None:
    from peft import PeftModel

    folder = trained_adapter(keys, "one")
    unmerged = logits(PeftModel.from_pretrained(load_model(tiny_model, torch.float32, False), str(folder)))
    base = logits(model)
    merged = lora().merge(model, [folder])
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert torch.allclose(logits(merged), unmerged, atol=1e-5)
    assert not torch.allclose(unmerged, base, atol=1e-2)


def test_all_but_the_last_adapter_are_merged_and_the_last_is_trained_on(keys: Keys, tiny_model: Path) -> None:
    first, second = trained_adapter(keys, "first"), trained_adapter(keys, "second", seed=7)
    both = logits(lora().merge(load_model(tiny_model, torch.float32, False), [first, second]))
    begun = lora().apply(load_model(tiny_model, torch.float32, False), [first, second])
    assert torch.allclose(logits(begun), both, atol=1e-5)
    names = keys(adapter_name_or_path=f"{first}, {second}", output_dir=str(first.with_name("third")), max_steps=1)
    third = train(Run.from_dict(names))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (second, third))
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)


def test_a_fresh_adapter_starts_where_the_merged_ones_end(keys: Keys, tiny_model: Path) -> None:
    first, second = trained_adapter(keys, "first"), trained_adapter(keys, "second", seed=7)
    both = logits(lora().merge(load_model(tiny_model, torch.float32, False), [first, second]))
    begun = lora(create_new_adapter=True, lora_rank=3).apply(load_model(tiny_model, torch.float32, False), [first, second])
    assert torch.allclose(logits(begun), both, atol=1e-5)
    trained = {name: weight for name, weight in begun.named_parameters() if weight.requires_grad}
    assert {min(weight.shape) for weight in trained.values()} == {3}
    assert all(not weight.any() for name, weight in trained.items() if ".lora_B." in name)


def test_an_adapter_of_another_model(keys: Keys, tmp_path: Path, tiny_model: Path) -> None:
    folder = trained_adapter(keys, "one")
    other = build_model(tmp_path / "wide", hidden_size=48)
    text = f"the adapter in {folder} does not fit this model: Error(s) in loading state_dict for PeftModelForCausalLM: size mismatch for"
    assert complaint(lambda: lora().merge(load_model(other, torch.float32, False), [folder])).startswith(text)
    assert complaint(lambda: lora().apply(load_model(other, torch.float32, False), [folder])).startswith(text)


def test_adapter_config_names_the_base_model(keys: Keys, tiny_model: Path) -> None:
    config = json.loads((trained_adapter(keys, "one") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 8, 16)


# ------------------------------------------------------------------ freeze and full


def changed(keys: Keys, tiny_model: Path, **changes: Any) -> set[str]:
    """Which weights one training step has changed."""
    folder = train(Run.from_dict(keys(max_steps=1, **changes)))
    before, after = (load_file(where / "model.safetensors") for where in (tiny_model, folder))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def layer(number: int, names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(f"model.layers.{number}.")}


@pytest.fixture
def all_weights(tiny_model: Path) -> set[str]:
    return set(load_file(tiny_model / "model.safetensors"))


def test_full_changes_every_weight(keys: Keys, tiny_model: Path, all_weights: set[str]) -> None:
    assert changed(keys, tiny_model, finetuning_type="full") == all_weights


@pytest.mark.parametrize(("number", "layers"), [(1, [1]), (-1, [0]), (2, [0, 1]), (-2, [0, 1])])
def test_freeze_trains_the_last_or_the_first_layers(
    number: int, layers: list[int], keys: Keys, tiny_model: Path, all_weights: set[str]
) -> None:
    expected = set().union(*(layer(place, all_weights) for place in layers))
    assert changed(keys, tiny_model, finetuning_type="freeze", freeze_trainable_layers=number) == expected


def test_freeze_trains_modules_by_name(keys: Keys, tiny_model: Path) -> None:
    names = {"freeze_trainable_layers": 1, "freeze_trainable_modules": "q_proj, input_layernorm", "freeze_extra_modules": "embed_tokens"}
    assert changed(keys, tiny_model, finetuning_type="freeze", **names) == {
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"freeze_trainable_layers": 0}, "'freeze_trainable_layers' is 0, but the model has 2 layers; give 1 to 2, or negative"),
        ({"freeze_trainable_layers": -3}, "'freeze_trainable_layers' is -3, but the model has 2 layers"),
        ({"freeze_trainable_modules": "mpl"}, "'freeze_trainable_modules': the model has no module 'mpl'; there are: all, down_proj, "),
        ({"freeze_trainable_modules": "mlpp"}, "'freeze_trainable_modules': the model has no module 'mlpp'; did you mean 'mlp'?"),
        ({"freeze_extra_modules": "lm_haed"}, "'freeze_extra_modules': the model has no module 'lm_haed'"),
        ({"freeze_extra_modules": "mlp"}, "'freeze_extra_modules': the model has no module 'mlp'"),
    ],
)
def test_freeze_says_what_is_not_there(options: dict[str, Any], text: str, model: Any) -> None:
    part = ADAPTERS["freeze"]
    shared = AdapterOptions(**{key: options[key] for key in AdapterOptions.model_fields if key in options})
    own = part.Options(**{key: value for key, value in options.items() if key in part.Options.model_fields})
    assert complaint(lambda: part(own, shared).apply(model)).startswith(text)


def test_only_lora_takes_adapters(keys: Keys, tmp_path: Path) -> None:
    text = complaint(lambda: Run.from_dict(keys(finetuning_type="full", adapter_name_or_path=str(tmp_path))))
    assert "Python: 'adapter_name_or_path' needs a 'finetuning_type' that goes on with adapters, found 'full'" in text.splitlines()


def test_a_folder_without_an_adapter(keys: Keys, tiny_model: Path) -> None:
    options = Run.from_dict(keys()).model.model_copy(update={"adapter_name_or_path": (str(tiny_model),)})
    assert complaint(lambda: locate_adapters(options)).endswith(f"{tiny_model} holds no adapter (no adapter_config.json)")
