"""Models whose weights are held in few bits: how they are opened, what they take, and how they become plain again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.compat import leave_out, need
from finery.errors import UserError
from finery.log import get_logger
from finery.models.quantizers import QUANTIZERS
from finery.models.quantizers.base import Quantizer, Quantizing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = get_logger(__name__)

HELD = "held_weight"
"""Name under which a layer keeps how its weights are had, see `Held`."""


OPENED = "opened_in"
"""Name under which a model keeps by which quantizer, in how many bits and in which number format it was loaded."""


@dataclass(frozen=True)
class Held:
    """How the weights (O, I) of a layer are had, whether its own products are those with them, and what they are held in."""

    weight: Callable[[torch.dtype], Tensor]
    is_exact: bool
    num_bytes: int


@dataclass(frozen=True)
class Opening:
    """What a model is loaded with."""

    quantizer: Quantizer
    bits: int | None  # None: it comes quantised
    arguments: Mapping[str, Any]


def opening(folder: Path, asked: Quantizing | None, dtype: torch.dtype, device: torch.device) -> Opening | None:
    """How to open the model in `folder`: as it comes quantised, else as it is `asked`, else plainly (None).

    Raises `UserError` for a package that is not there, or a format that nothing here reads.
    """
    config = own_quantization(folder)
    if config:
        if asked:
            log.warning("%s comes quantised (%s): 'quantization_bit' has no effect", folder, config.get("quant_method"))
        quantizer = _reader(str(config.get("quant_method")), folder)
        if quantizer.package:
            need(quantizer.package, f"the model comes quantised by {type(quantizer).__name__}")
        return Opening(quantizer, None, quantizer.opening(config, dtype))
    if asked is None:
        return None
    where = {"device_map": asked.device_map or {"": device}} if asked.quantizer.loads_packed else {}
    return Opening(asked.quantizer, asked.bits, {**asked.quantizer.arguments(asked.bits, dtype, device), **where})


def leave_out_others(folder: Path, asked: Quantizing | None) -> None:
    """Where a run has no need of the packages of quantizers, they need not be imported; to be called before transformers is."""
    comes = str(own_quantization(folder).get("quant_method"))
    for name in QUANTIZERS.names():
        part = QUANTIZERS[name]
        needed = part.serves_others or comes in part.checkpoints or isinstance(asked.quantizer if asked else None, part)
        if part.package and not needed:
            leave_out([part.package.partition(".")[0]])


def own_quantization(folder: Path) -> dict[str, Any]:
    """What config.json says of how a model comes quantised; empty where it is plain."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # told where the model is loaded
        return {}
    return config.get("quantization_config") or {}


def _reader(method: str, folder: Path) -> Quantizer:
    for name in QUANTIZERS.names():
        part = QUANTIZERS[name]
        if method in part.checkpoints:
            return part(part.Options())
    known = ", ".join(sorted(word for name in QUANTIZERS.names() for word in QUANTIZERS[name].checkpoints))
    raise UserError(f"{folder} comes quantised by {method!r}, which is not read here; formats that are: {known}")


def settle(model: Any, way: Opening, dtype: torch.dtype, device: torch.device) -> Any:
    """Finish a model that was opened this `way`; its layers tell from then on how their weights are had. Says what they take."""
    quantizer = way.quantizer
    model = quantizer.finish(model, way.bits, dtype, device)
    if quantizer.widens:
        return _forget(model)
    model.__dict__[OPENED] = {
        "method": type(quantizer).__module__.rpartition(".")[2],
        "bits": way.bits,
        "options": quantizer.options.model_dump(mode="json"),
        "dtype": str(dtype).removeprefix("torch."),
    }
    for layer in list(model.modules()):
        if quantizer.holds(layer):
            taken = sum(tensor.numel() * tensor.element_size() for tensor in quantizer.tensors(layer))
            layer.__dict__[HELD] = Held(partial(quantizer.plain_weight, layer), quantizer.is_exact(layer), taken)
    if held := [found for _, found in held_layers(model)]:
        weights = num_held(model)
        taken = sum(one.num_bytes for one in held)
        each = 8 * taken / weights
        asked = f", {quantizer.bits_each(way.bits, dtype):.3g} expected with scales" if way.bits else ""
        log.info("%s weights of %d layers are held in %.1f MB: %.3g bits each%s", f"{weights:,}", len(held), taken / 1e6, each, asked)
    return model


def held_layers(model: nn.Module) -> Iterator[tuple[str, Held]]:
    """Layers whose weights are held in few bits, by their paths."""
    return ((path, layer.__dict__[HELD]) for path, layer in model.named_modules() if HELD in layer.__dict__)


def is_held(model: nn.Module) -> bool:
    """Whether any of its layers hold their weights in few bits."""
    return any(True for _ in held_layers(model))


def num_held(model: nn.Module) -> int:
    """How many weights are held in few bits."""
    return sum(layer.in_features * layer.out_features for layer in model.modules() if HELD in layer.__dict__)  # type: ignore[operator]


def num_weights(model: nn.Module) -> int:
    """How many weights a model has, those of few bits counted one by one."""
    packed = {id(p) for layer in model.modules() if HELD in layer.__dict__ for p in layer.parameters(recurse=False) if p.ndim > 1}
    return num_held(model) + sum(p.numel() for p in model.parameters() if id(p) not in packed)


def widen(model: Any, dtype: torch.dtype) -> Any:
    """Plain linear layers in `dtype` in place of those that are held in few bits; raises `UserError` where a format cannot be widened."""
    from torch import nn

    for path, held in list(held_layers(model)):
        parent, _, name = path.rpartition(".")
        layer = model.get_submodule(path)
        bias = layer.bias
        plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta", dtype=dtype)
        plain.weight = nn.Parameter(held.weight(dtype).contiguous(), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        setattr(model.get_submodule(parent), name, plain)
    return _forget(model)


def _forget(model: Any) -> Any:
    """Nothing tells any more that the model came in few bits: transformers would save it so, or back in its own names for that."""
    marks = ("quantization_config", "is_quantized", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
    for holder in (model, model.config):
        for mark in (*marks, "_weight_conversions"):
            holder.__dict__.pop(mark, None)
    return model
