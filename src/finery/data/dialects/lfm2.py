"""LFM2: calls as a list of Python calls, with arguments by name.

The reference writes strings without escaping what is in them, so that a quotation mark ends them; here they are JSON.
Both are read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import NAME, Call, Dialect, bare, dump, unquoted
from finery.data.dialects.shapes.literals import Literals
from finery.data.sample import BadRecord

__all__ = ["LFM2"]

_ENDS = r"\s*(?:[,:)\]}]|\Z)"
_STRING = rf"""\"(?:[^"\\]|\\.|"(?!{_ENDS}))*"|'(?:[^'\\]|\\.|'(?!{_ENDS}))*'"""  # a quotation mark inside may be bare
_CALL = re.compile(rf"[\s,]*(?P<name>{NAME})\(")


def _unquote(string: str) -> str:
    """The text of a string as JSON or Python writes it."""
    text = re.sub(r'\\(.)|"', _as_json, string[1:-1], flags=re.DOTALL)
    return json.loads(f'"{text}"', strict=False)


def _as_json(mark: re.Match[str]) -> str:
    """A backslash with what follows it, or a bare quotation mark, as JSON has them."""
    if mark[1] is None:
        return '\\"'
    if mark[1] == "x":
        return r"\u00"
    if mark[1] in "'\n":
        return mark[1].strip()
    return mark[0] if mark[1] in '"\\/bfnrtu' else "\\" + mark[0]


class LFM2(Dialect):
    """`[tool(key="text", other=2)]` between marks."""

    opening = re.compile(r"<\|tool_call_start\|>\s*\[?")
    _literals = Literals(_STRING, NAME, _unquote)

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """One JSON list of bare schemas."""
        return dump([bare(tool) for tool in tools])

    def write(self, calls: Sequence[Call]) -> str:
        """One list of all calls; values as JSON."""
        return f"<|tool_call_start|>[{', '.join(map(_written, calls))}]<|tool_call_end|>"

    def read(self, text: str, mark: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> tuple[list[Call], int]:
        """The calls of one list; values as JSON or as Python has them."""
        calls: list[Call] = []
        at = mark.end()
        while name := _CALL.match(text, at):
            try:
                arguments, at = self._literals.pairs(text, name.end(), "=", ")")
            except (ValueError, RecursionError):
                break
            calls.append(Call(name["name"], arguments))
        return calls, at


def _written(call: Call) -> str:
    for key in call.arguments:
        if not re.fullmatch(NAME, key):
            raise BadRecord(f"the argument {key!r} of a call has a name that this tool format cannot write")
    return f"{unquoted(call.name)}({', '.join(f'{key}={dump(value)}' for key, value in call.arguments.items())})"
