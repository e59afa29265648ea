"""Nested states of an optimizer, a scheduler or dice as safetensors and JSON: nothing pickled is written or read."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from finery.files import usual_modes

TENSOR = "__tensor__"
"""In the JSON part, `{TENSOR: name}` stands for a tensor of the safetensors file."""
PAIRS = "__pairs__"
"""A dict whose keys are not text is written as a list of pairs."""

FEW_BITS = "__few_bits__"
"""Marks a wrapper of torchao's: its class, the tensors in it, and what else it was made with."""
WRAPPERS = {f"OptimState{word}": f"torchao.optim.subclass_{word.lower()}" for word in ("8bit", "4bit", "Fp8")}
"""Where their classes lie. No other is ever made from a file."""


class Unsavable(TypeError):
    """A state holds things that are no numbers, texts or tensors."""


def save_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write a nested state of numbers, texts, lists, dicts and tensors as <name>.json and <name>.safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        text = json.dumps(_plain(state, tensors))
    except TypeError as error:
        raise Unsavable(f"the state of the {name} cannot be saved without pickle ({error})") from None
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
        usual_modes(folder)


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """Read what `save_state` wrote."""
    path = folder / f"{name}.safetensors"
    tensors = load_file(path) if path.exists() else {}
    return _rich(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if (kind := type(value).__name__) in WRAPPERS:
        names, others = value.__tensor_flatten__()
        parts = {name: _plain(getattr(value, name), tensors) for name in names}
        return {FEW_BITS: kind, "parts": parts, "others": [str(o) if isinstance(o, torch.dtype) else _plain(o, tensors) for o in others]}
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(item, tensors) for key, item in value.items()}
        return {PAIRS: [[key, _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_plain(item, tensors) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"there is a {type(value).__name__} in it")


def _rich(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_rich(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if FEW_BITS in value:
        others = [tuple(o) if isinstance(o, list) else getattr(torch, o[6:]) if isinstance(o, str) else o for o in value["others"]]
        wrapper = getattr(import_module(WRAPPERS[value[FEW_BITS]]), value[FEW_BITS])
        return wrapper.__tensor_unflatten__(_rich(value["parts"], tensors), others)
    if PAIRS in value:
        return {key: _rich(item, tensors) for key, item in value[PAIRS]}
    return {key: _rich(item, tensors) for key, item in value.items()}
