"""Alpaca: one instruction with an optional input, one output, optional earlier turns."""

from collections.abc import Mapping
from typing import Any

from finery.data.formats.base import Format
from finery.data.sample import BadRecord, Message

__all__ = ["Alpaca"]


class Alpaca(Format):
    """Columns prompt, query, response, history, system, tools."""

    def read(self, record: Mapping[str, Any]) -> tuple[list[Message], str, str]:
        """One question and answer after the history's; an empty input adds no newline."""
        question = "\n".join(filter(None, (self.text(record, self.columns.prompt), self.text(record, self.columns.query))))
        if not question:
            raise BadRecord(f"the question is empty (columns {self.columns.prompt!r} and {self.columns.query!r})")
        answer = record.get(self.columns.response) if self.columns.response else None
        if not isinstance(answer, str):
            raise BadRecord(f"{self.columns.response!r} should be text, found {'nothing' if answer is None else type(answer).__name__}")
        messages = [*self._history(record), Message("user", question), Message("assistant", answer)]
        return messages, self.text(record, self.columns.system), self.tools(record)

    def _history(self, record: Mapping[str, Any]) -> list[Message]:
        rounds = (record.get(self.columns.history) if self.columns.history else None) or []
        messages = []
        for pair in rounds:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise BadRecord(f"{self.columns.history!r} should hold pairs of question and answer")
            messages += [Message("user", pair[0]), Message("assistant", pair[1])]
        return messages
