"""GLM-4: a call is the tool's name on a line and its arguments as JSON; one call a turn."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import NAME, Call, Dialect, bare, dialect_text, dump, fill, only, unquoted
from finery.data.dialects.shapes.json_calls import SPACE, json_at, past

__all__ = ["GLM4"]


class GLM4(Dialect):
    """Name, line break, JSON."""

    opening = re.compile(rf"^[ \t]*(?P<name>{NAME})[ \t]*\n(?=\s*\{{)", re.MULTILINE)

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A heading and an indented schema for each."""
        text = dialect_text("glm4_tool")
        return "".join(fill(text, name=tool["name"], schema=dump(tool, indent=4)) for tool in map(bare, tools))

    def write(self, calls: Sequence[Call]) -> str:
        """Raises `BadRecord` for several calls."""
        call = only(calls)
        return f"{unquoted(call.name)}\n{dump(call.arguments)}"

    def read(self, text: str, mark: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> tuple[list[Call], int]:
        """A call with which the answer ends."""
        found = json_at(text, mark.end())
        if not found or past(SPACE, text, found[1]) != len(text):
            return [], mark.end()
        return [Call(mark["name"], found[0])], len(text)
