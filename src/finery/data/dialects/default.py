"""LLaMA-Factory's own, for models of no dialect: `Action: NAME` and `Action Input: JSON`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import NAME, Call, Dialect, bare, dialect_text, dump, fill, unquoted
from finery.data.dialects.shapes.json_calls import json_at

__all__ = ["Default"]


class Default(Dialect):
    """Action and Action Input."""

    opening = re.compile(rf"Action:[ \t]*(?P<name>{NAME})\s*Action Input:(?=\s*\{{)")

    def describe(self, tools: Sequence[Mapping[str, Any]], date: str | None = None) -> str:
        """The tools in prose, and their names once more."""
        names = ", ".join(bare(tool)["name"] for tool in tools)
        return fill(dialect_text("default"), tools=self.listed(tools), names=names)

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Name, description and a line for each parameter."""
        return "\n".join(map(_told, map(bare, tools)))

    def write(self, calls: Sequence[Call]) -> str:
        """Two lines for each call."""
        return "\n".join(f"Action: {unquoted(call.name)}\nAction Input: {dump(call.arguments)}" for call in calls)

    def read(self, text: str, mark: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> tuple[list[Call], int]:
        """One call."""
        found = json_at(text, mark.end())
        return ([Call(mark["name"], found[0])], found[1]) if found else ([], mark.end())


def _told(tool: Mapping[str, Any]) -> str:
    schema = tool.get("parameters") or {}
    properties, required = schema.get("properties"), schema.get("required")
    told = [_argument(name, about, required) for name, about in properties.items()] if isinstance(properties, Mapping) else []
    description = str(tool.get("description") or "")
    return fill(dialect_text("default_tool"), name=tool["name"], description=description, arguments="".join(told))


def _argument(name: str, about: Any, required: Any) -> str:
    about = about if isinstance(about, Mapping) else {}
    needed = ", required" if isinstance(required, list) and name in required else ""
    choices = f", should be one of [{', '.join(map(str, enum))}]" if isinstance(enum := about.get("enum"), list) and enum else ""
    kind = items.get("type") if isinstance(items := about.get("items"), Mapping) else None
    each = f", where each item should be {kind}" if kind else ""
    return f"  - {name} ({about.get('type', '')}{needed}): {about.get('description', '')}{choices}{each}\n"
