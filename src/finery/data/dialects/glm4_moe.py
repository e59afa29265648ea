"""GLM 4.5 and later: calls in tags, each argument as a pair of key and value.

The reference leaves out `</tool_call>` and puts an empty line between calls; here both are as in GLM's own template.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import NAME, Call, lines, wrapped
from finery.data.dialects.shapes.parameters import Parameters

__all__ = ["GLM4MoE"]


class GLM4MoE(Parameters):
    """<arg_key> and <arg_value> in <tool_call>."""

    opening = re.compile(rf"<tool_call>\s*(?P<name>{NAME})(?=\s*(?:<|\Z))")
    call = "\n<tool_call>{name}\n{arguments}</tool_call>"
    argument = "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A wrapped schema on each line."""
        return lines([wrapped(tool) for tool in tools])

    def write(self, calls: Sequence[Call]) -> str:
        """A block for each call."""
        return "".join(map(self.written, calls))
