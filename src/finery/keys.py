"""Every key of a run's file, as programs want it: type, default, range, choices and help; whatever tells of keys is drawn from this."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from finery.data.template import template_names
from finery.options import OptionGroup
from finery.run import PARTS, all_options, never, not_yet, own_keys
from finery.training.arguments import RENAMED, TrainerField, enum_values, trainer_fields

Schema = dict[str, Any]
LOOP = "the trainer's own"
"""Who owns the keys that are handed on as they are."""


@dataclass(frozen=True)
class Key:
    """A key, as JSON schema tells it: type, enum, limits, default, description."""

    name: str
    owner: str
    schema: Schema
    needed: bool = False


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key that can be set: our parts', then what is left to the trainer."""
    own = [
        Key(name, owner, _of_group(group, name), field.is_required())
        for owner, group in all_options().items()
        for name, field in group.model_fields.items()
    ]
    gone = own_keys() | not_yet()["keys"].keys() | never().keys() | RENAMED.keys()
    return (*own, *(Key(name, LOOP, _of_field(field)) for name, field in trainer_fields().items() if name not in gone))


@cache
def _choices() -> dict[str, list[str]]:
    """Keys whose values are names of files, or of what transformers has."""
    named = {key: registry.names() for registry, key in PARTS.values()}
    return named | {"template": template_names(), "lr_scheduler_type": list(enum_values("SchedulerType"))}


@cache
def _properties(group: type[OptionGroup]) -> Schema:
    return group.model_json_schema()["properties"]


def _of_group(group: type[OptionGroup], name: str) -> Schema:
    found = {key: value for key, value in _properties(group)[name].items() if key != "title"}
    about = {"description": found.pop("description", "")}
    found.pop("default", None)
    if not (field := group.model_fields[name]).is_required():
        default = field.get_default(call_default_factory=True)
        about["default"] = list(default) if isinstance(default, tuple) else default
    if name in _choices():
        found = {"type": "string", "enum": _choices()[name]}
    elif found.get("type") == "array":
        found = {"anyOf": [{"type": "array", "items": found["items"]}, {"type": "string"}]}
    return found | about


_TYPES = {"dict": "object", "list": "array", "bool": "boolean", "int": "integer", "float": "number", "str": "string"}
_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}


def _of_field(field: TrainerField) -> Schema:
    variants: list[Schema] = [
        {"type": _TYPES[kind]} | {_LIMITS[bound]: limit for bound, limit in field.range.items()} for kind in field.types
    ]
    if field.choices:
        words: Schema = {"type": "string", "enum": list(field.choices)}
        other = {"bool": {"type": "boolean"}, "list": {"type": "array", "items": words}}
        variants = [words, *(other[kind] for kind in field.types if kind in other)]
    typed = variants[0] if len(variants) == 1 else {"anyOf": variants}
    return {**typed, "description": field.help, "default": field.default}


# ------------------------------------------------------------------ in words

_WORDS = {
    "object": "a mapping",
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def type_words(schema: Schema) -> str:
    """`a whole number above 0`, `one of cpu, auto`: what a value may be."""
    if (items := schema.get("anyOf", [{}])[0].get("items")) in ({"type": "string"}, {"type": "number"}):
        return f"a list{' of numbers' if items['type'] == 'number' else ''}, or text with commas"
    if "anyOf" in schema:
        variants = [type_words(variant) for variant in schema["anyOf"] if variant.get("type") != "null"]
        return " or ".join(dict.fromkeys(variants))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "enum" in schema.get("items", {}):
        return "a list of them"
    limits = [f"{word} {schema[bound]:g}" for bound, word in _BOUNDS.items() if bound in schema]
    return " ".join([_WORDS[schema["type"]], " and ".join(limits)]).strip()


def default_words(key: Key) -> str:
    """The default as one would write it in the file."""
    if key.needed:
        return "needed"
    default = key.schema.get("default")
    if isinstance(default, list):
        return ", ".join(default) or "not set"
    if default is None or default in ("", {}):
        return "not set"
    return default if isinstance(default, str) else json.dumps(default)
