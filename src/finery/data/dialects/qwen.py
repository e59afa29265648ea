"""Qwen 2 to 3, and Hermes: schemas in <tools>, each call as JSON in <tool_call>; several calls, a line each."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import Call, lines, wrapped
from finery.data.dialects.shapes.json_calls import MarkedJSON

__all__ = ["Qwen"]


class Qwen(MarkedJSON):
    """JSON in <tool_call>."""

    opening = re.compile("<tool_call>")

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A wrapped schema on each line."""
        return lines([wrapped(tool) for tool in tools])

    def write(self, calls: Sequence[Call]) -> str:
        """A block for each call."""
        return "\n".join(f"<tool_call>\n{self.object_of(call)}\n</tool_call>" for call in calls)
