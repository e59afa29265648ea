"""Gemma 4: schemas and calls in a notation of its own, with strings between `<|"|>`.

The reference keeps the order of parameters, tells nothing of what is inside of them, and puts all tools between one pair
of marks; here parameters are sorted and told whole, and each tool has its marks, as in Gemma's own template.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import NAME, Call, Dialect, bare, dump, unquoted
from finery.data.dialects.shapes.literals import Literals

__all__ = ["Gemma4"]

_QUOTE = '<|"|>'
_NEVER = re.compile(r"(?!)")
_KEY = re.compile(r'[^\s:{}\[\],"<|](?:[^:{}\[\],"<|]*[^\s:{}\[\],"<|])?')


def _unquote(string: str) -> str:
    return string[5:-5] if string.startswith(_QUOTE) else json.loads(string, strict=False)


class Gemma4(Dialect):
    """`call:NAME{key:value}` between marks.

    A string in which `<|"|>` stands, which the notation cannot say, is written as JSON, and a key with a mark in it as a string.
    """

    opening = re.compile(rf"<\|tool_call>\s*call:(?P<name>{NAME})\{{")
    _literals = Literals(r'<\|"\|>.*?<\|"\|>|"(?:[^"\\]|\\.)*"', r'[^:{}\[\],"<|]+', _unquote)

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A declaration for each; the template writes the first mark and the last."""
        return "<tool|><|tool>".join(map(_declaration, map(bare, tools)))

    def write(self, calls: Sequence[Call]) -> str:
        """A pair of marks for each call; keys are sorted as Gemma's template does."""
        return "".join(f"<|tool_call>call:{unquoted(call.name)}{_value(call.arguments)}<tool_call|>" for call in calls)

    def read(self, text: str, mark: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> tuple[list[Call], int]:
        """One call."""
        try:
            arguments, end = self._literals.pairs(text, mark.end(), ":", "}")
        except (ValueError, RecursionError):
            return [], mark.end()
        return [Call(mark["name"], arguments)], end


def _value(value: Any, quote_keys: bool = False) -> str:
    if isinstance(value, str):
        return dump(value).replace("<", "\\u003c") if _QUOTE in value else f"{_QUOTE}{value}{_QUOTE}"
    if isinstance(value, Mapping):
        bare_key = _NEVER if quote_keys else _KEY
        return _pairs({key if bare_key.fullmatch(key) else _value(key): _value(item, quote_keys) for key, item in _sorted(value)})
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_value(item, quote_keys) for item in value)}]"
    return dump(value)


def _sorted(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """By key, whatever its case."""
    return sorted(value.items(), key=lambda pair: pair[0].lower())


def _declaration(tool: Mapping[str, Any]) -> str:
    told = {"description": _value(tool.get("description") or "")}
    if schema := tool.get("parameters"):
        told["parameters"] = _pairs(_object(schema) | _kind(schema))
    return f"declaration:{tool['name']}{_pairs(told)}"


def _object(schema: Mapping[str, Any]) -> dict[str, str]:
    told = {"properties": _properties(schema["properties"])} if schema.get("properties") else {}
    return told | ({"required": _value(schema["required"])} if schema.get("required") else {})


def _kind(schema: Mapping[str, Any]) -> dict[str, str]:
    return {"type": _value(str(schema.get("type", "")).upper())}


def _properties(properties: Any) -> str:
    return _pairs({key: _property(schema) for key, schema in _sorted(properties)}) if isinstance(properties, Mapping) else "{}"


def _property(schema: Any) -> str:
    """What Gemma is told of a parameter, in the order of its template."""
    if not isinstance(schema, Mapping):
        schema = {}
    kind = str(schema.get("type", "")).lower()
    told = {"description": _value(schema["description"])} if schema.get("description") else {}
    if kind == "string" and schema.get("enum"):
        told["enum"] = _value(schema["enum"])
    if kind == "array" and isinstance(items := schema.get("items"), Mapping) and items:
        told["items"] = _pairs({key: _item(key, value) for key, value in _sorted(items) if value is not None})
    if schema.get("nullable"):
        told["nullable"] = "true"
    if kind == "object":
        told |= {"properties": "{}", **_object(schema)}
    return _pairs(told | _kind(schema))


def _item(key: str, value: Any) -> str:
    if key == "properties":
        return _properties(value)
    if key == "type":
        value = [str(kind).upper() for kind in value] if isinstance(value, list) else str(value).upper()
    return _value(value, quote_keys=True)


def _pairs(told: Mapping[str, str]) -> str:
    return f"{{{','.join(f'{key}:{value}' for key, value in told.items())}}}"
