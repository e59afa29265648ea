"""Mistral before v11: schemas and calls are JSON lists; the template writes the mark before the calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import Call, dump, wrapped
from finery.data.dialects.shapes.json_calls import BareJSON

__all__ = ["Mistral"]


class Mistral(BareJSON):
    """A JSON list of calls."""

    def listed(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """One JSON list of wrapped schemas."""
        return dump([wrapped(tool) for tool in tools])

    def write(self, calls: Sequence[Call]) -> str:
        """A list, of a single call too."""
        return dump([self.object_of(call) for call in calls])
