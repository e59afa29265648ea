"""MiniMax M1: all calls in one <tool_calls>, a line of JSON each."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import Call, bare, lines
from finery.data.dialects.shapes.json_calls import MarkedJSON

__all__ = ["MiniMax1"]


class MiniMax1(MarkedJSON):
    """JSON lines in <tool_calls>."""

    opening = re.compile("<tool_calls>")

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A bare schema on each line."""
        return lines([bare(tool) for tool in tools])

    def write(self, calls: Sequence[Call]) -> str:
        """One block of all calls."""
        return "\n".join(["<tool_calls>", *(self.object_of(call) for call in calls), "</tool_calls>"])
