"""More layers for a model, which computes the same with them as before (LLaMA-Pro; Wu et al., 2024, arXiv 2401.02415)."""

from __future__ import annotations

import copy
from typing import Any

from finery.errors import UserError
from finery.models.adapters.base import layer_stack

ENDS = ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "fc2", "dense_4h_to_h", "wo", "w2")
"""The last linear layers of attention and MLP, as families of models call them: where they give zero, a layer passes on what it gets."""
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "max_window_layers")
"""Keys of a config that tell something of every layer, as a list."""


def expand(model: Any, number: int) -> None:
    """Put a copy of itself after every k-th layer, `number` in all, each of which adds nothing; raises `UserError` where that cannot be."""
    from torch import nn

    name, layers = layer_stack(model)
    before = len(layers)
    if number < 1 or before % number:
        fitting = ", ".join(str(n) for n in range(1, before + 1) if before % n == 0)
        raise UserError(f"--blocks should divide the {before} layers of the model ({fitting}), found {number}")
    each = before // number
    places = [place for first in range(0, before, each) for place in (*range(first, first + each), first + each - 1)]
    added = {each + group * (each + 1) for group in range(number)}
    grown = nn.ModuleList([_silent(layers[place]) if spot in added else layers[place] for spot, place in enumerate(places)])
    for spot, layer in enumerate(grown):
        for module in layer.modules():
            if "layer_idx" in module.__dict__:
                module.layer_idx = spot  # type: ignore[assignment]  # where its keys and values are cached
    parent, _, own = name.removesuffix(".").rpartition(".")
    setattr(model.get_submodule(parent), own, grown)
    _grow_config(model.config.get_text_config(), before, places)


def _silent(layer: Any) -> Any:
    """A copy that gives what it gets: attention and MLP end in zeros, and only the way past them is left."""
    import torch

    twin = copy.deepcopy(layer)
    ends = [module for path, module in twin.named_modules() if path.rpartition(".")[2] in ENDS and hasattr(module, "weight")]
    with torch.no_grad():
        for module in ends:
            module.weight.zero_()
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    if len(ends) < 2:
        raise UserError("the layers of this model end in no linear layers that are known here, so that a copy would not be silent")
    return twin


def _grow_config(config: Any, before: int, places: list[int]) -> None:
    for key in PER_LAYER:
        found = getattr(config, key, None)
        if isinstance(found, (list, tuple)) and len(found) == before:
            setattr(config, key, [found[place] for place in places])
    config.num_hidden_layers = len(places)
