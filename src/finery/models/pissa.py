"""PiSSA (Meng et al., 2024, arXiv 2404.02948): an adapter that starts as the main singular parts of the weights, which keep the rest.

Shapes: A (r, inputs), B (outputs, r), scale s. The base becomes W - s·B0·A0, so that an adapter is only right beside the base that it began
with. What is saved is therefore the difference to the plain base, s·(B·A - B0·A0), as an ordinary adapter of rank 2r: A over A0, and B
beside -B0. A run that goes on takes the halves apart again, without any rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.log import get_logger

if TYPE_CHECKING:
    from torch import Tensor

log = get_logger(__name__)

Start = dict[str, tuple["Tensor", "Tensor"]]
"""A0 and B0 by the layer's path."""


def begins_with_main_parts(model: Any, iterations: int, keeps_both: bool) -> None:
    """Let a fresh LoRA start so, by a decomposition with so many iterations (-1: an exact one), drawn with dice of its own.

    From then on the model saves and loads as the head of this file tells; where it `keeps_both`, the start and the trained pair as well.
    """
    import torch

    how = "pissa" if iterations < 0 else f"pissa_niter_{iterations}"
    start: Start = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for path, layer, name in lora_layers(model):
            layer.pissa_init(name, how)
            start[path] = layer.lora_A[name].weight.detach().clone(), layer.lora_B[name].weight.detach().clone()
    model.save_pretrained = partial(_save, model, model.save_pretrained, start, keeps_both)
    model.load_adapter = partial(_load, model, start)


def lora_layers(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Layers with a pair of matrices, by path, and the name of the adapter."""
    name = model.active_adapter
    return ((path, layer, name) for path, layer in model.named_modules() if name in getattr(layer, "lora_A", {}))


def _save(model: Any, save: Callable[..., None], start: Start, keeps_both: bool, folder: str, **how: Any) -> None:
    """As peft does, and then the difference to the plain base in place of the pair."""
    from safetensors.torch import load_file, save_file

    save(folder, **how)
    target = Path(folder)
    config = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    pair = load_file(target / "adapter_model.safetensors")
    halves, joined = dict(pair), dict(pair)
    for path, (down, up) in start.items():
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        halves |= {a: down.cpu().to(pair[a].dtype), b: up.cpu().to(pair[b].dtype)}
        joined |= {a: _stack(pair[a], halves[a], 0), b: _stack(pair[b], -halves[b], 1)}
    plain = config | {"init_lora_weights": True}
    whole = plain | _ranks(model, config)
    _write(target, joined, whole, save_file)
    if keeps_both and not target.name.startswith("checkpoint-"):
        for name, weights, told in (("init", halves, plain), ("backup", pair, plain), ("converted", joined, whole)):
            _write(target / f"pissa_{name}", weights, told, save_file)


def _stack(first: Tensor, second: Tensor, dim: int) -> Tensor:
    import torch

    return torch.cat([first, second], dim).contiguous()


def _write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any], save_file: Callable[..., None]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _ranks(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Twice the rank at the same scale; layers whose rank or scale is of a pattern are told one by one."""
    layers = {path.removeprefix("base_model.model."): (layer.r[name], layer.scaling[name]) for path, layer, name in lora_layers(model)}
    rank, scale = next(iter(layers.values()))
    patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    return {
        "use_rslora": False,  # the scale that it gives is told as it is
        "r": 2 * rank,
        "lora_alpha": scale * 2 * rank,
        "rank_pattern": {path: 2 * r for path, (r, _) in layers.items()} if patterns else {},
        "alpha_pattern": {path: s * 2 * r for path, (r, s) in layers.items()} if patterns else {},
    }


def _load(model: Any, start: Start, folder: str, adapter_name: str, **how: Any) -> None:
    """Take a saved adapter apart; where its start is not the one of this run, the base gives back this one and gives up that one."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(Path(folder) / "adapter_model.safetensors")
    moved = 0
    with torch.no_grad():
        for path, layer, name in lora_layers(model):
            a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
            (trained_a, down), (trained_b, minus_up) = weights[a].chunk(2, 0), weights[b].chunk(2, 1)
            weights |= {a: trained_a.contiguous(), b: trained_b.contiguous()}
            down, up = down.to(start[path][0]), -minus_up.to(start[path][1])
            if not (torch.equal(down, start[path][0]) and torch.equal(up, start[path][1])):
                moved += 1
                base = layer.get_base_layer().weight
                change = layer.scaling[name] * (start[path][1] @ start[path][0] - up @ down)
                base += (change.t() if layer.fan_in_fan_out else change).to(base.dtype)
                start[path] = down.clone(), up.clone()
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    if moved:
        log.warning("the main parts of %d layers came out otherwise than when the run began: those in %s count", moved, folder)
