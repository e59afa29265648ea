"""Seed-OSS: calls in tags, each argument between tags of its own.

The reference leaves out the `>` after a tool's name and puts an empty line between calls; here both are as in ByteDance's
own template.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import NAME, Call, bare, dump
from finery.data.dialects.shapes.parameters import Parameters

__all__ = ["SeedOSS"]


class SeedOSS(Parameters):
    """<function=…> and <parameter=…> in <seed:tool_call>."""

    opening = re.compile(rf"(?:<seed:tool_call>\s*)?<function=(?P<name>{NAME})>?")
    call = "\n<seed:tool_call>\n<function={name}>\n{arguments}</function>\n</seed:tool_call>"
    argument = "<parameter={key}>{value}</parameter>\n"

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """One JSON list of the schemas."""
        return dump([bare(tool) for tool in tools])

    def write(self, calls: Sequence[Call]) -> str:
        """A block for each call."""
        return "".join(map(self.written, calls))
