"""Rotary positions for rows longer than a model was made for, and the same positions wherever the model serves later.

L positions that the model was made for, d numbers of a head that are turned, factor s, base b, frequencies b^(-2i/d):
linear (Chen et al., 2023, arXiv 2306.15595) divides them by s; dynamic (NTK-aware, growing with the row) takes
b·(s·n/L - (s - 1))^(d/(d-2)) for rows of n > L tokens; yarn (Peng et al., 2023, arXiv 2309.00071) and llama3 (Llama 3.1) divide the low
ones, leave the high ones and go from one to the other between. transformers computes them from the config's `rope_parameters`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finery.errors import UserError
from finery.log import get_logger
from finery.models.head import row_lengths

if TYPE_CHECKING:
    from torch import Tensor, nn

log = get_logger(__name__)

Kind = Literal["linear", "dynamic", "yarn", "llama3"]
FILE = "rope.json"
"""Beside an adapter: the positions that it was trained with, which no file of its base tells."""
SERVED_FACTOR = 2.0
"""For a model that no run has trained, whose rows nobody can foresee."""
_OWN = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}  # as in Llama 3.1
_KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""What a scaled model has of the unscaled one's parameters."""
_GROWS = ("yarn", "llama3", "longrope")
"""Kinds whose config tells both lengths: the old one among the parameters, the new one as `max_position_embeddings`."""


@dataclass(frozen=True)
class Rope:
    """A kind and its factor."""

    kind: str
    factor: float

    def set(self, config: Any) -> None:
        """Put it into a config that no model has been built from yet. Where layers differ, those that see everything are scaled."""
        text = config.get_text_config()
        original, found = original_length(config), _scaled(config)
        if self.kind == "dynamic" and found[0] is not text.rope_parameters:
            raise UserError("'rope_scaling: dynamic' serves no model whose layers differ in their positions: take yarn or linear")
        for parameters in found:
            kept = {name: parameters[name] for name in _KEPT if parameters.get(name) is not None}
            own = {"original_max_position_embeddings": original} if self.kind in _GROWS else {}
            parameters.clear()
            parameters.update({"rope_type": self.kind, "factor": self.factor, **own, **_OWN.get(self.kind, {}), **kept})
        text.max_position_embeddings = int(original * self.factor) if self.kind in _GROWS else original


def _parameters(config: Any) -> dict[str, Any]:
    """All of them; raises `UserError` for a model without rotary positions."""
    text = config.get_text_config()
    found = text.to_dict().get("rope_parameters")
    if not found or "max_position_embeddings" not in text.to_dict():
        raise UserError(
            f"'rope_scaling': a model of type {text.model_type!r} has no rotary positions that could be scaled; leave the key out"
        )
    return text.rope_parameters


def _scaled(config: Any) -> list[dict[str, Any]]:
    """The parameters of layers that see everything: those of windows never look further than the window."""
    found = _parameters(config)
    nested = {name: value for name, value in found.items() if isinstance(value, dict)}
    return [value for name, value in nested.items() if "sliding" not in name] if nested else [found]


def original_length(config: Any) -> int:
    """Positions that the model was made for, before any scaling."""
    parameters, text = _scaled(config)[0], config.get_text_config()
    return int(parameters.get("original_max_position_embeddings") or text.max_position_embeddings)


def longest(config: Any) -> int:
    """Positions that the model as it is serves, scaling included."""
    parameters, text = _scaled(config)[0], config.get_text_config()
    stretched = parameters.get("rope_type") in ("linear", "dynamic")
    return int(text.max_position_embeddings * (parameters.get("factor") or 1 if stretched else 1))


def to_train(kind: str, cutoff_len: int, config: Any) -> Rope | None:
    """The smallest whole factor with which rows of `cutoff_len` fit; none where they fit as it is."""
    if cutoff_len <= longest(config):
        return None
    return Rope(kind, float(math.ceil(cutoff_len / original_length(config))))


# ------------------------------------------------------------------ trained = served


def save_positions(model: Any, folder: Path, stretched: bool) -> None:
    """Beside an adapter, where its base's own config tells others. A whole model's config.json holds them anyway."""
    if not stretched:
        (folder / FILE).unlink(missing_ok=True)
        return
    text = model.config.get_text_config()
    told = {"rope_parameters": text.rope_parameters, "max_position_embeddings": text.max_position_embeddings}
    (folder / FILE).write_text(json.dumps(told, indent=1), encoding="utf-8")


def restore_positions(told: Mapping[str, Any], config: Any) -> None:
    """Put what `save_positions` wrote into a config."""
    text = config.get_text_config()
    text.rope_parameters, text.max_position_embeddings = told["rope_parameters"], told["max_position_embeddings"]


def trained_positions(folder: Path) -> Callable[[Any], None] | None:
    """How to change a config so that an adapter finds the positions that it was trained with; nothing where they are the base's own."""
    path = folder / FILE
    return partial(restore_positions, json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def to_serve(kind: str | None, config: Any) -> None:
    """For a model that no run has trained: twice its length, unless it comes scaled."""
    if kind is None:
        return
    if _scaled(config)[0].get("rope_type", "default") != "default":
        log.info("'rope_scaling': the model comes with positions that are scaled already; they stay as they are")
        return
    log.warning("'rope_scaling: %s': no run has trained this model with it, so its factor is %g", kind, SERVED_FACTOR)
    Rope(kind, SERVED_FACTOR).set(config)


# ------------------------------------------------------------------ dynamic, row by row


def scale_row_by_row(model: nn.Module) -> int:
    """Let dynamic positions depend on each row's own length, and not on the longest row beside it; returns in how many modules.

    transformers changes a module's frequencies on the way, for all rows of a batch, and all threads. Serving one conversation is the same.
    """
    found = list(_dynamic(model))
    for module in found:
        module.forward = partial(_turned_row_by_row, module)
    return len(found)


def _dynamic(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if "rope_type" in vars(module) and vars(module)["rope_type"] == "dynamic")


def _turned_row_by_row(module: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    config = module.config
    parameters, made_for = config.rope_parameters, config.max_position_embeddings
    factor, width = parameters["factor"], 2 * module.original_inv_freq.shape[0]
    lengths = row_lengths(x.shape[0], x.shape[1], x.device).clamp(min=made_for)
    base = parameters["rope_theta"] * (factor * lengths / made_for - (factor - 1)) ** (width / (width - 2))
    powers = torch.arange(0, width, 2, device=x.device, dtype=torch.float) / width
    angles = position_ids[..., None].float() * base[..., None] ** -powers
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * module.attention_scaling).to(x.dtype), (angles.sin() * module.attention_scaling).to(x.dtype)
