"""Families of models as GGUF knows them: a config told in its words, and read out of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finery.errors import UserError
from finery.files import read_yaml
from finery.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Family:
    """See `gguf_families.yaml`."""

    model_type: str
    arch: str
    turned: bool = False
    shifted: bool = False
    biases: Sequence[str] = ()
    activations: Sequence[str] = ()
    rope: Sequence[str] = ()
    needs: Sequence[str] = ()
    windowed: int = 0
    scaled_alone: Sequence[int] = ()

    def scale(self, fields: Mapping[str, Any]) -> float:
        """The `query_pre_attn_scalar` that a reader of the file takes."""
        if fields["num_hidden_layers"] in self.scaled_alone:
            return fields["hidden_size"] / fields["num_attention_heads"]
        return float(fields["head_dim"])


@cache
def _data() -> Mapping[str, Any]:
    return read_yaml(Path(__file__).with_suffix(".yaml"))


@cache
def families() -> Mapping[str, Family]:
    """By the config's model_type."""
    return {name: Family(name, **entry) for name, entry in _data()["families"].items()}


def family_of(config: Any) -> Family:
    """Raises `UserError` for a model that cannot be written."""
    found = families().get(config.model_type)
    if found is None:
        raise UserError(f"'export_format: gguf' writes {', '.join(families())}; this model is of the family {config.model_type}")
    return found


def sizes(config: Any, family: Family) -> Iterator[tuple[str, int | float]]:
    """What the file says of the shape of the model, after the name of the architecture; raises `UserError` for what it cannot say."""
    fields = config.to_dict()
    _check(fields, family)
    if fields.get("sliding_window") and not family.windowed:
        log.warning(
            "the model sees %d tokens at a time, and programs that read GGUF let '%s' see all: longer texts come out differently",
            fields["sliding_window"],
            family.arch,
        )
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for kind, number in (("numbers", int), ("fractions", float)):
        for name, field in _data()[kind].items():
            if fields.get(field) is not None:
                yield name, number(fields[field])


def _check(fields: Mapping[str, Any], family: Family) -> None:
    """Raises `UserError` for what the programs that read the file would compute otherwise."""
    activation = next((fields[name] for name in ("hidden_activation", "hidden_act") if fields.get(name)), None)
    if activation not in family.activations:
        raise _untold(f"the activation {activation} (only {', '.join(family.activations)})", family)
    for name in family.needs:
        if fields.get(name) is None:
            raise _untold(f"a model without {name}", family)
    if fields.get("use_bidirectional_attention"):
        raise _untold("attention in both directions", family)
    kinds = fields.get("layer_types") or []
    if family.windowed:
        usual = ["full_attention" if (place + 1) % family.windowed == 0 else "sliding_attention" for place in range(len(kinds))]
        if kinds != usual:
            raise _untold(f"layers that see everything other than every {family.windowed}.", family)
        if abs(fields["query_pre_attn_scalar"] - family.scale(fields)) > 1e-6:
            raise _untold(f"query_pre_attn_scalar: {fields['query_pre_attn_scalar']} (only {family.scale(fields):g})", family)


def _untold(what: str, family: Family) -> UserError:
    return UserError(f"'export_format: gguf' has no words for {what} in the family {family.model_type}")


def config_fields(facts: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config's fields out of what a file says of the shape (`facts`: after the name of the architecture)."""
    fields: dict[str, Any] = {}
    for name, field in (*_data()["numbers"].items(), *_data()["fractions"].items()):
        if name in facts:
            value = facts[name]
            fields[field] = float(f"{value:.6g}") if isinstance(value, float) else value  # the file holds fp32
    fields["sliding_window"] = fields.get("sliding_window") or None
    if family.turned and "head_dim" not in fields and "rope.dimension_count" in facts:
        fields["head_dim"] = facts["rope.dimension_count"]
    if family.windowed and "head_dim" in fields:
        fields["query_pre_attn_scalar"] = round(family.scale(fields))
    return fields


def read_family(facts: Mapping[str, Any], arch: str) -> Family | None:
    """The family that a file's architecture means; llama with a window is Mistral."""
    found = [family for family in families().values() if family.arch == arch]
    if not found:
        return None
    return found[-1] if facts.get("attention.sliding_window") else found[0]
