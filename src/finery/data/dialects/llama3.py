"""Llama 3: calls are JSON with `name` and `parameters`.

The reference writes two lines of dates before the tools, the second with the day of the rendering. Here they stand
where the data give a date, and nowhere else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import Call, dialect_text, dump, fill, wrapped
from finery.data.dialects.shapes.json_calls import BareJSON

__all__ = ["Llama3"]


class Llama3(BareJSON):
    """One JSON object, or a list of several."""

    arguments = "parameters"

    def describe(self, tools: Sequence[Mapping[str, Any]], date: str | None = None) -> str:
        """As Meta's, with the dates only where one is given."""
        dates = "" if date is None else fill(dialect_text("llama3_dates"), date=date)
        return dates + super().describe(tools)

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Indented wrapped schemas."""
        return "".join(f"{dump(wrapped(tool), indent=4)}\n\n" for tool in tools)

    def write(self, calls: Sequence[Call]) -> str:
        """An object, or a list where there are several."""
        found = [self.object_of(call) for call in calls]
        return dump(found[0] if len(found) == 1 else found)
