"""Rotary positions as GGUF tells them: a base, a kind of scaling, and factors for each frequency where a formula needs them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finery.errors import UserError
from finery.log import get_logger
from finery.models.gguf_families import Family

if TYPE_CHECKING:
    from torch import Tensor

log = get_logger(__name__)

_READ = {  # what is told of each kind; all else would be lost
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "original_max_position_embeddings", "long_factor", "short_factor", "attention_factor"),
}
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass
class Positions:
    """What a file says of them."""

    facts: dict[str, Any] = field(default_factory=dict)  # after the name of the architecture
    factors: dict[str, Tensor] = field(default_factory=dict)  # by the name of the tensor


def tell_positions(config: Any, family: Family) -> Positions:
    """Out of a config; raises `UserError` for what the format, or the programs that read it, do not know."""
    told, parameters = Positions(), config.rope_parameters
    if "full_attention" in parameters:  # as layers of a window have them, and as the others
        near = parameters["sliding_attention"]
        if near.get("rope_type", "default") != "default":
            raise UserError("'export_format: gguf' has no words for scaled positions in layers that see a window")
        told.facts["rope.freq_base_swa"] = float(near["rope_theta"])
        parameters = parameters["full_attention"]
    kind = parameters.get("rope_type", "default")
    width = _head_width(config)
    told.facts["rope.freq_base"] = float(parameters["rope_theta"])
    told.facts["rope.dimension_count"] = int(width * (parameters.get("partial_rotary_factor") or 1.0))
    known = (*_READ.get(kind, ()), "rope_type", "type", "rope_theta", "partial_rotary_factor")
    strange = sorted(name for name, value in parameters.items() if name not in known and value is not None)
    if kind not in family.rope or strange or parameters.get("truncate") is False:
        what = f"with {strange[0]}" if strange else f"of the kind {kind}"
        raise UserError(f"'export_format: gguf' has no words for positions {what} in the family {family.model_type}")
    {"linear": _tell_linear, "dynamic": _tell_dynamic, "yarn": _tell_yarn, "llama3": _tell_llama3, "longrope": _tell_longrope}.get(
        kind, lambda *_: None
    )(told, config, parameters)
    return told


def _head_width(config: Any) -> int:
    fields = config.to_dict()
    return int(fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"])


def _tell_linear(told: Positions, config: Any, parameters: Mapping[str, Any]) -> None:
    told.facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}


def _tell_dynamic(told: Positions, config: Any, parameters: Mapping[str, Any]) -> None:
    length = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    told.facts["context_length"] = length
    log.warning("GGUF has no words for dynamic positions: the file is right for texts of up to %d tokens, and says so", length)


def _tell_yarn(told: Positions, config: Any, parameters: Mapping[str, Any]) -> None:
    factor = float(parameters["factor"])
    told.facts |= {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    told.facts["rope.scaling.original_context_length"] = int(original)
    for name in ("beta_fast", "beta_slow"):
        if parameters.get(name):
            told.facts[f"rope.scaling.yarn_{name}"] = float(parameters[name])
    if parameters.get("attention_factor"):  # of the one that follows from the factor
        told.facts["rope.scaling.attn_factor"] = float(parameters["attention_factor"]) / _yarn_attention(factor)


def _yarn_attention(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _tell_llama3(told: Positions, config: Any, parameters: Mapping[str, Any]) -> None:
    told.factors[FREQUENCIES] = _llama3_factors(config)


def _llama3_factors(config: Any) -> Tensor:
    """By which number each frequency is divided."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * len(scaled)
    plain = 1.0 / (config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width))
    return (plain / scaled.double()).float()


def _tell_longrope(told: Positions, config: Any, parameters: Mapping[str, Any]) -> None:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    told.facts["rope.scaling.original_context_length"] = int(parameters["original_max_position_embeddings"])
    told.facts["rope.scaling.attn_factor"] = float(attention)
    for name, key in ((LONG, "long_factor"), (SHORT, "short_factor")):
        told.factors[name] = torch.tensor([float(each) for each in parameters[key]])


def read_positions(facts: Mapping[str, Any], factors: Mapping[str, Tensor], fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config's `rope_parameters`; `fields` are the config's others."""
    near = _rounded(facts.get("rope.freq_base_swa", 10_000.0))
    far = {"rope_type": "default", "rope_theta": _rounded(facts.get("rope.freq_base", 10_000.0))}
    width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    if 0 < (turned := facts.get("rope.dimension_count", width)) < width:
        far["partial_rotary_factor"] = turned / width
    kind = facts.get("rope.scaling.type")
    if LONG in factors:
        own = {"long_factor": factors[LONG].tolist(), "short_factor": factors[SHORT].tolist()}
        own["original_max_position_embeddings"] = facts["rope.scaling.original_context_length"]
        far |= {"rope_type": "longrope", **own, "attention_factor": facts.get("rope.scaling.attn_factor", 1.0)}
    elif FREQUENCIES in factors:
        far |= _read_llama3(factors[FREQUENCIES], far, fields, family)
    elif kind in ("linear", "yarn"):
        far |= {"rope_type": kind, "factor": _rounded(facts["rope.scaling.factor"])}
    if kind == "yarn":
        far["original_max_position_embeddings"] = facts.get("rope.scaling.original_context_length", fields["max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in facts:
                far[name] = _rounded(facts[f"rope.scaling.yarn_{name}"])
        if "rope.scaling.attn_factor" in facts:
            far["attention_factor"] = facts["rope.scaling.attn_factor"] * _yarn_attention(far["factor"])
    if family.arch == "gemma3":
        return {"full_attention": far, "sliding_attention": {"rope_type": "default", "rope_theta": near}}
    return far


def _rounded(number: float) -> float:
    """The file holds fp32."""
    return float(f"{number:.6g}")


def _read_llama3(factors: Tensor, far: Mapping[str, Any], fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The formula whose factors they are, where it is that of Llama 3.1; else the factors as they are."""
    import torch
    from transformers import AutoConfig

    factor = _rounded(float(factors.max()))
    plain = {name: value for name, value in fields.items() if name in ("hidden_size", "num_attention_heads", "head_dim")}
    for length in (8192, round(fields["max_position_embeddings"] / factor)):
        own = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": length}
        guess = {**far, "rope_type": "llama3", **own}
        config = AutoConfig.for_model(family.model_type, **plain, max_position_embeddings=int(length * factor), rope_parameters=guess)
        if torch.allclose(_llama3_factors(config), factors, rtol=1e-4):
            return guess
    own = {"long_factor": factors.tolist(), "short_factor": factors.tolist(), "attention_factor": 1.0}
    return {"rope_type": "longrope", **own, "original_max_position_embeddings": fields["max_position_embeddings"]}
