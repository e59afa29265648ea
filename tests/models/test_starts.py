"""Adapters that start at something: PiSSA from another start, and LoftQ, which is served and merged beside what it corrects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conftest import build_model
from finery.commands.export import export
from finery.commands.train import train
from finery.models.adapters.lora import LoRA
from finery.models.load import load_model
from finery.models.pissa import lora_layers
from finery.models.quantized import held_layers
from finery.models.tokenizer import load_tokenizer
from finery.models.trained import find_trained, load_answering
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
IDS = torch.tensor([[5, 9, 40, 77, 3, 120]])


def loaded(run: Run) -> Any:
    """The model as chat loads it."""
    found = find_trained(run.model, run.adapter, run.loop.output_dir)
    tokenizer = load_tokenizer(found.tokenizer_folder, False)
    return load_answering(found, run.adapter, tokenizer, run.model, run.quantizing, torch.device("cpu")).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_pissa_from_another_start(tiny_model: Path, tmp_path: Path) -> None:
    """A checkpoint whose main parts came out otherwise is gone on with as it is: the base gives back this start and gives up that one."""
    first, other = (LoRA(LoRA.Options.model_validate({"pissa_init": True, "pissa_iter": iterations})) for iterations in (-1, 0))
    model = first.apply(load_model(tiny_model, torch.float32, False)).eval()
    for _, layer, name in lora_layers(model):
        layer.lora_A[name].weight.data *= 1.3
    model.save_pretrained(str(tmp_path / "checkpoint"))
    resumed = other.apply(load_model(tiny_model, torch.float32, False)).eval()
    resumed.load_adapter(str(tmp_path / "checkpoint"), "default", is_trainable=True)
    assert torch.allclose(logits(resumed), logits(model), atol=1e-4)
    for (_, layer, name), (_, theirs, _) in zip(lora_layers(resumed), lora_layers(model), strict=True):
        assert torch.equal(layer.lora_A[name].weight, theirs.lora_A[name].weight)


def test_loftq_starts_nearer_and_is_merged_into_what_it_corrects(keys: Keys, tmp_path: Path) -> None:
    wide = build_model(tmp_path / "wide", hidden_size=64, intermediate_size=128, initializer_range=0.2)
    plain = logits(load_model(wide, torch.float32, False).eval())
    given = {"model_name_or_path": str(wide), "quantization_bit": 2, "quantization_method": "hqq", "lora_rank": 16, "learning_rate": 1e-9}
    apart = []
    for changes in ({}, {"loftq_init": True}):
        run = Run.from_dict(keys(**given, **changes, output_dir=str(tmp_path / f"out{len(changes)}"), max_steps=1), trains=True)
        train(run)
        apart.append(float((logits(loaded(run)) - plain).norm()))
        merged = logits(load_model(export(run), torch.float32, False).eval())
        # the usual adapter goes into the plain weights, this one into the widened ones that it belongs to
        beside = logits(loaded(run)) if changes else plain
        assert float((merged - beside).norm()) < 0.05 * apart[0]
    assert apart[1] < 0.9 * apart[0]  # the adapter takes back some of the rounding
    told = json.loads((tmp_path / "out1" / "held_in.json").read_text())
    assert (told["method"], told["bits"]) == ("hqq", 2)


def test_a_loftq_adapter_is_answered_with_beside_its_own_weights(keys: Keys, tmp_path: Path) -> None:
    """Also where the file no longer says that the weights were held in few bits; and it is gone on with."""
    wide = build_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    given = keys(model_name_or_path=str(wide), quantization_bit=4, loftq_init=True, max_steps=4, save_strategy="steps", save_steps=2)
    folder = train(Run.from_dict(given, trains=True))
    held = loaded(Run.from_dict(given))
    plain = loaded(Run.from_dict({key: value for key, value in given.items() if key not in ("quantization_bit", "loftq_init")}))
    assert list(held_layers(held)) and not list(held_layers(plain))
    assert torch.allclose(logits(held), logits(plain), atol=1e-3)
    again = given | {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(folder / "checkpoint-2")}
    assert torch.equal(logits(loaded(Run.from_dict(again | {"output_dir": str(train(Run.from_dict(again, trains=True)))}))), logits(held))
