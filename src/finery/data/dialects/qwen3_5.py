"""Qwen 3.5 and Qwen3-Coder: calls in tags, each argument on lines of its own."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import NAME, Call, bare, lines
from finery.data.dialects.shapes.parameters import Parameters

__all__ = ["Qwen35"]


class Qwen35(Parameters):
    """<function=…> and <parameter=…> in <tool_call>."""

    opening = re.compile(rf"(?:<tool_call>\s*)?<function=(?P<name>{NAME})>?")  # models forget the outer mark
    call = "<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>"
    argument = "<parameter={key}>\n{value}\n</parameter>\n"

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A bare schema on each line."""
        return lines([bare(tool) for tool in tools])

    def write(self, calls: Sequence[Call]) -> str:
        """A block for each call."""
        return "\n".join(map(self.written, calls))
