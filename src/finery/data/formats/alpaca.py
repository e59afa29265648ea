"""Alpaca: one instruction with an optional input, one output, optional earlier turns."""

from collections.abc import Mapping
from typing import Any

from finery.data.formats.base import SHARED, Format, as_text, kind_of
from finery.data.sample import BadRecord, Message, Sample

__all__ = ["Alpaca"]


class Alpaca(Format):
    """Columns prompt, query, response, history, system, tools, media; chosen and rejected in place of a response."""

    reads = ("prompt", "query", "response", "history", *SHARED)

    def read(self, record: Mapping[str, Any]) -> Sample:
        """The history's turns, the question, and the answer where there is one."""
        columns = self.columns
        messages = self._history(record) if columns.history else []
        messages.append(Message("user", self._question(record)))
        facts = self.shared(record)
        answer = record.get(columns.response) if columns.response else None
        if self.ranking:
            for role in ("chosen", "rejected"):
                column = getattr(columns, role)
                facts[role] = Message("assistant", as_text(record.get(column), repr(column)))
        elif answer is not None:
            messages.append(Message("assistant", as_text(answer, repr(columns.response))))
        elif columns.response:
            facts["unanswered"] = f"{columns.response!r} is {'null' if columns.response in record else 'not in the record'}"
        else:
            facts["unanswered"] = "no column holds answers"
        return Sample(tuple(messages), self.text(record, columns.system), **facts)

    def where(self, record: Mapping[str, Any], number: int) -> str:
        """In the history, or the column of the question or of the answer."""
        columns = self.columns
        in_history = 2 * len((record.get(columns.history) if columns.history else None) or ())
        if number < in_history:
            return f"{columns.history!r}[{number // 2}][{number % 2}]"
        asked = columns.prompt if columns.prompt and record.get(columns.prompt) else columns.query
        return repr(asked if number == in_history else columns.response)

    def _question(self, record: Mapping[str, Any]) -> str:
        """Prompt and query, a line each; an empty one adds no line."""
        columns = self.columns
        prompt, query = self.text(record, columns.prompt), self.text(record, columns.query)
        if prompt or query:
            return f"{prompt}\n{query}" if prompt and query else prompt or query
        names = [name for name in (columns.prompt, columns.query) if name]
        missed = "question" if columns.response or self.ranking else "text"
        if found := [name for name in names if name in record]:
            raise BadRecord(f"the {missed} is empty: nothing stands in {' and '.join(map(repr, found))}")
        raise BadRecord(f"there is no {missed}: the record has neither of {', '.join(map(repr, names))}, but {_listed(record)}")

    def _history(self, record: Mapping[str, Any]) -> list[Message]:
        column = self.columns.history
        rounds = (record.get(column) if column else None) or ()
        if not isinstance(rounds, (list, tuple)):
            raise BadRecord(f"{column!r} should be a list of pairs of question and answer, found {kind_of(rounds)}")
        messages = []
        for place, pair in enumerate(rounds):
            at = f"{column!r}[{place}]"
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise BadRecord(f"{at} should be a pair of question and answer")
            messages.append(Message("user", as_text(pair[0], f"{at}[0]")))
            messages.append(Message("assistant", as_text(pair[1], f"{at}[1]")))
        return messages


def _listed(record: Mapping[str, Any]) -> str:
    names = [repr(name) for name in record]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing at all"
