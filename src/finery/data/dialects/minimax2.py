"""MiniMax M2: calls in tags, all of a turn in one <minimax:tool_call>.

The reference leaves the outer tag out; here it stands, after a line break, as in MiniMax's own template.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import NAME, Call, bare, dump
from finery.data.dialects.shapes.parameters import Parameters

__all__ = ["MiniMax2"]


class MiniMax2(Parameters):
    """<invoke name=…> and <parameter name=…>."""

    opening = re.compile(rf'(?:<minimax:tool_call>\s*)?<invoke name="(?P<name>{NAME})">')
    call = '<invoke name="{name}">\n{arguments}</invoke>\n'
    argument = '<parameter name="{key}">{value}</parameter>\n'

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A bare schema in <tool> on each line."""
        return "\n".join(f"<tool>{dump(bare(tool))}</tool>" for tool in tools)

    def write(self, calls: Sequence[Call]) -> str:
        """One block of all calls."""
        return f"\n<minimax:tool_call>\n{''.join(map(self.written, calls))}</minimax:tool_call>"
