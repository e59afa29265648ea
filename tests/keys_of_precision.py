"""Cases of the keys that say in how many bits weights are held. `test_every_key.py` runs them."""

from typing import Any

import torch
from safetensors.torch import load_file

from conftest import build_model
from finery.models.quantized import held_layers
from watched import Bench, Outcome, losses

FOUR = {"quantization_bit": 4}


def wide(bench: Bench) -> dict[str, Any]:
    """A model whose layers hold blocks of 64 weights."""
    return {"model_name_or_path": str(build_model(bench.tmp_path / "wide", hidden_size=64, intermediate_size=128))}


def taken(run: Outcome) -> int:
    """Bytes of weights in few bits."""
    return sum(one.num_bytes for _, one in held_layers(run.trainer.model))


def layers(run: Outcome) -> set[str]:
    """Kinds of layers that hold few bits."""
    return {type(run.trainer.model.get_submodule(path)).__name__ for path, _ in held_layers(run.trainer.model)}


def quantization_bit(bench: Bench) -> None:
    base = wide(bench)
    assert taken(bench.train(**base)) == 0
    assert 0 < taken(bench.train(**base, quantization_bit=4)) < taken(bench.train(**base, quantization_bit=8))


def quantization_method(bench: Bench) -> None:
    base = wide(bench) | FOUR
    assert layers(bench.train(**base)) == {"Linear4bit"}
    assert layers(bench.train(**base, quantization_method="hqq")) == {"HQQLinear"}


def quantization_type(bench: Bench) -> None:
    base = wide(bench) | FOUR
    assert losses(bench.train(**base)) != losses(bench.train(**base, quantization_type="fp4"))


def double_quantization(bench: Bench) -> None:
    base = wide(bench) | FOUR
    assert taken(bench.train(**base)) < taken(bench.train(**base, double_quantization=False))


def quantization_device_map(bench: Bench) -> None:
    from finery.models import load

    asked: list[Any] = []
    opening = load.opening

    def spy(*args: Any) -> Any:
        asked.append(way := opening(*args))
        return way

    bench.patch.setattr(load, "opening", spy)
    base = wide(bench) | FOUR
    assert bench.chat(**base, quantization_device_map="auto") == bench.chat(**base)  # there is one device here
    assert [way.arguments["device_map"] for way in asked] == ["auto", {"": torch.device("cpu")}]


def stochastic_rounding(bench: Bench) -> None:
    """Steps far below a weight's last digit: nearest rounding loses them all, chance makes some, in the direction of the gradient."""
    base = {"pure_bf16": True, "finetuning_type": "full", "learning_rate": 2e-6, "max_steps": 4, "lr_scheduler_type": "constant"}
    start = load_file(bench.tiny_model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].to(torch.bfloat16)
    moved = []
    for changes in ({}, {"stochastic_rounding": True}):
        after = bench.train(**base, **changes).weights("model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        moved.append(float((after != start).float().mean()))
    assert moved[0] < 0.3 < 2 * moved[0] + 0.3 and moved[1] > moved[0] + 0.02
    assert "set 'pure_bf16: true'" in bench.train(stochastic_rounding=True).complaint


NAMED = (stochastic_rounding, quantization_bit, quantization_method, quantization_type, double_quantization, quantization_device_map)
OTHERS = {case.__name__: case for case in NAMED}
