"""Calls in tags, each argument in a tag of its own: text stands as it is, everything else as JSON.

Such a call does not say whether `5` is a number or text: the tool's schema does. Where the schema lets a parameter be
text, among others, text that reads as a value of one of the others comes back as that value; where there is no schema
for a parameter, text that reads as JSON other than quoted text does. Nothing else is lost: text in which the
argument's closing mark stands, which would end too early for any reader, is written as JSON without '<' in it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finery.data.dialects.base import Call, Dialect, bare, dump, unquoted
from finery.data.dialects.shapes.json_calls import SPACE, json_at, past
from finery.data.sample import BadRecord

_ESCAPED = "\\u003c"
_PYTHON = {"True": True, "False": False, "None": None}


class Parameters(Dialect):
    """`call` and `argument` say how both are written; line breaks beside the marks may be missing when they are read."""

    opening: re.Pattern[str]  # its group `name` is the tool's
    call: str
    argument: str

    def __init__(self) -> None:
        before, middle, after = (_loosely(part) for part in re.split(r"\{(?:key|value)\}", self.argument))
        # a value ends where another mark follows its closing one, or nothing does
        self._argument = re.compile(rf"\s*{before}(?P<key>.*?){middle}(?P<value>.*?){after}(?=\s*(?:<|\Z))", re.DOTALL)
        self._value_end = self.argument.partition("{value}")[2].strip()
        self._call_end = self.call.partition("{arguments}")[2].strip()

    def written(self, call: Call) -> str:
        """One call; raises `BadRecord` where the name of an argument has a mark in it."""
        arguments = "".join(self._written(key, value) for key, value in call.arguments.items())
        return self.call.format(name=unquoted(call.name), arguments=arguments)

    def read(self, text: str, mark: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> tuple[list[Call], int]:
        """One call, if it is closed or nothing but its closing mark is missing."""
        schemas = dict(_schemas(mark["name"], tools))
        arguments: dict[str, Any] = {}
        at = mark.end()
        while found := self._argument.match(text, at):
            arguments[found["key"]] = _value(found["value"], schemas.get(found["key"], frozenset()))
            at = found.end()
        at = past(SPACE, text, at)
        tag = self._call_end.partition("\n")[0]
        if text.startswith(tag, at):
            return [Call(mark["name"], arguments)], at + len(tag)
        rest = text[at : at + len(self._call_end)]
        cut = rest != "<" and self._call_end.startswith(rest)
        whole_name = arguments or not tools or mark["name"] in (bare(tool).get("name") for tool in tools)
        return ([Call(mark["name"], arguments)] if whole_name and (cut or self.opening.match(text, at)) else []), at

    def _written(self, key: str, value: Any) -> str:
        text = value if isinstance(value, str) else dump(value)
        if self._value_end in text or (isinstance(value, str) and _is_escaped(text)):
            text = dump(value).replace("<", _ESCAPED)
        written = self.argument.format(key=key, value=text)
        found = self._argument.match(written)
        if not found or (found["key"], found["value"]) != (key, text):
            raise BadRecord(f"the argument {key!r} of a call has a name that this tool format cannot write")
        return written


def _loosely(mark: str) -> str:
    return re.escape(mark).replace("\\\n", "\n?")


def _is_escaped(text: str) -> bool:
    return text.startswith('"') and _ESCAPED in text


def _value(text: str, kinds: frozenset[str]) -> Any:
    """A value of one of the kinds that its schema names, if it names any."""
    found = json_at(text, 0)
    value = found[0] if found and past(SPACE, text, found[1]) == len(text) else text
    if _is_escaped(text):
        return value
    if isinstance(value, str) or ("string" in kinds and not kinds & _kinds_of(value)):
        return _PYTHON.get(text.strip(), text) if kinds and "string" not in kinds else text
    return value


def _kinds_of(value: Any) -> frozenset[str]:
    """The names of a JSON value's type."""
    if isinstance(value, bool) or value is None:
        return frozenset(["null" if value is None else "boolean"])
    if isinstance(value, int):
        return frozenset(["integer", "number"])
    names = {str: "string", float: "number", list: "array"}
    return frozenset([names.get(type(value), "object")])


def _schemas(name: str, tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, frozenset[str]]]:
    """The kinds of value that each parameter of a tool takes."""
    for tool in map(bare, tools):
        root = tool.get("parameters")
        properties = root.get("properties") if tool.get("name") == name and isinstance(root, Mapping) else None
        if isinstance(properties, Mapping):
            yield from ((key, frozenset(_kinds(schema, root, 8))) for key, schema in properties.items())


def _kinds(schema: Any, root: Any, depth: int) -> Iterator[str]:
    """The kinds of value that a schema takes; none where it does not say. References go `depth` deep, since they may go round."""
    if not isinstance(schema, Mapping) or not depth:
        return
    named = schema.get("type")
    yield from (str(kind) for kind in _several(named) or [named] if kind)
    if not named:
        values = [*_several(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
        yield from (kind for value in values for kind in _kinds_of(value))
    if schema.get("nullable"):
        yield "null"
    for key in ("anyOf", "oneOf", "allOf"):
        for choice in _several(schema.get(key)):
            yield from _kinds(choice, root, depth - 1)
    if isinstance(reference := schema.get("$ref"), str):
        target = root
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        yield from _kinds(target, root, depth - 1)


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
