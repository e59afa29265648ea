"""What a tool dialect is: how tools are described to a model, and how its calls are written and read back."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finery.data.formats.base import kind_of, read_json
from finery.data.formats.sharegpt import read_call
from finery.data.sample import BadRecord
from finery.files import read_yaml

NAME = r"[\w.-]+"
"""A tool's name where a dialect writes it without quotes."""
FOLDER = Path(__file__).with_name("macros")
"""Dialects in Jinja: a class's macros lie in NAME.jinja if it is in NAME.py, and take those of its bases over."""
_PLACE = r"\{\{(\w+)\}\}"


@dataclass(frozen=True)
class Call:
    """One use of a tool."""

    name: str
    arguments: dict[str, Any]


class Dialect(ABC):
    """How one family of models is told of tools and calls them.

    An answer's thought and special tokens are the caller's: the first is taken off before an answer is read, and an
    answer is decoded with its special tokens, since they are the marks of many dialects.
    """

    opening: re.Pattern[str]
    """Where a call may begin."""

    @abstractmethod
    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """The tools as they stand inside the dialect's text."""

    @abstractmethod
    def write(self, calls: Sequence[Call]) -> str:
        """The calls of one turn; raises `BadRecord` where the dialect cannot say them."""

    @abstractmethod
    def read(self, text: str, mark: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> tuple[list[Call], int]:
        """The calls that begin at `mark` and where they end; no calls where they cannot be read. Never raises."""

    def describe(self, tools: Sequence[Mapping[str, Any]], date: str | None = None) -> str:
        """What goes after the system text. `date` is today's where the data name one."""
        return fill(dialect_text(type(self).__module__.rpartition(".")[2]), tools=self.listed(tools))

    @property
    def macros(self) -> str:
        """Jinja that defines `tools_of(tools)`, which writes what `describe` does without a date, and `calls_of(tool_calls)`, `write`.

        Tools and calls are as chat templates get them, with arguments that are objects. It writes nothing by itself, but
        eats spaces that follow. Names are not looked at: what `write` refuses for one is written as it stands.
        """
        modules = [kind.__module__.rpartition(".")[2] for kind in type(self).__mro__]
        files = [FOLDER / f"{module}.jinja" for module in reversed(modules)]
        source = "".join(file.read_text(encoding="utf-8") for file in files if file.exists())
        return re.sub(r"\bTEXT(?:\.(\w+))?", lambda place: _expression(dialect_text(place[1] or modules[0])), source)

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, list[Call]] | None:
        """What an answer says before its calls, and the calls; nothing where no call can be read.

        The schemas settle types that a dialect leaves open. What stands between or after calls is no part of the answer.
        """
        calls: list[Call] = []
        before = at = 0
        while mark := self.opening.search(text, at):
            found, end = self.read(text, mark, tools)
            if found and not calls:
                before = mark.start()
            calls += found
            at = end if found else mark.end()
        return (text[:before].rstrip(), calls) if calls else None


def read_tools(text: str) -> list[dict[str, Any]]:
    """Function schemas, bare or wrapped as OpenAI does, from JSON text; raises `BadRecord`."""
    found = read_json(text, "the list of tools") if text.strip() else []
    tools = found if isinstance(found, list) else [found]
    for place, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or not isinstance(schema := tool.get("function", tool), Mapping):
            raise BadRecord(f"tool {place} should be a function schema, found {kind_of(tool)}")
        if not isinstance(schema.get("name"), str):
            raise BadRecord(f"tool {place} should be a function schema with a 'name'")
        if not isinstance(parameters := schema.get("parameters") or {}, Mapping):
            raise BadRecord(f"the parameters of tool {place} should be a schema, an object, found {kind_of(parameters)}")
    return tools


def read_calls(text: str) -> list[Call]:
    """The calls of a function turn, from JSON text: an object or a list; raises `BadRecord`."""
    found = read_json(text, "the function call")
    calls = [to_call(call, f"function call {place}") for place, call in enumerate(found if isinstance(found, list) else [found])]
    if not calls:
        raise BadRecord("a function turn should hold a call, found none")
    return calls


def to_call(value: Any, at: str) -> Call:
    """One call from its object; arguments that are JSON text are read."""
    inner = value.get("function") if isinstance(value, Mapping) else None
    call = read_call(inner if isinstance(inner, Mapping) else value, at)
    return Call(call["name"], dict(call["arguments"]))


def bare(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function's schema without OpenAI's wrapping."""
    return tool["function"] if isinstance(tool.get("function"), Mapping) else tool


def wrapped(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function's schema in OpenAI's wrapping."""
    return tool if isinstance(tool.get("function"), Mapping) else {"type": "function", "function": tool}


def dump(value: Any, indent: int | None = None) -> str:
    """A value as JSON text."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def lines(values: Sequence[Any]) -> str:
    """Values as JSON, one on a line."""
    return "\n".join(dump(value) for value in values)


def unquoted(name: str) -> str:
    """A tool's name for a dialect that writes it without quotes."""
    if not re.fullmatch(NAME, name):
        raise BadRecord(f"a tool's name should be letters, digits, '_', '.' and '-' in this tool format, found {name!r}")
    return name


def only(calls: Sequence[Call]) -> Call:
    """The call of a dialect that knows one call a turn."""
    if len(calls) != 1:
        raise BadRecord(f"this tool format has one call a turn, found {len(calls)}")
    return calls[0]


def fill(text: str, **values: str) -> str:
    """A text with its places filled in; what is filled in is not looked at again."""
    return re.sub(_PLACE, lambda place: values.get(place[1], place[0]), text)


@cache
def _texts() -> dict[str, str]:
    return read_yaml(Path(__file__).with_name("texts.yaml"))


def dialect_text(name: str) -> str:
    """A text of texts.yaml; a dialect's own has the name of its file."""
    return _texts()[name]


def _expression(text: str) -> str:
    """A text as Jinja, each of its places as the variable of that name."""
    parts = [part if place % 2 else jinja_string(part) for place, part in enumerate(re.split(_PLACE, text)) if part]
    return f"({' ~ '.join(parts)})"


def jinja_string(text: str) -> str:
    """A text in quotes, so that nothing in it is read as Jinja or trimmed."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"
