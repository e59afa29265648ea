"""Calls written as JSON, between marks or bare."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finery.data.dialects.base import Call, Dialect, dump, to_call
from finery.data.sample import BadRecord

SPACE = re.compile(r"\s*")
_JOINT = re.compile(r"[\s,;]*")  # some models write a list without its brackets


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse)  # models break lines inside of strings


def past(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where `pattern`, if it stands at `at`, ends."""
    return match.end() if (match := pattern.match(text, at)) else at


def json_at(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value that begins at `at`, after spaces, and where it ends."""
    try:
        return _DECODER.raw_decode(text, past(SPACE, text, at))
    except (ValueError, RecursionError):  # a number of thousands of digits, a thousand brackets
        return None


def calls_in(value: Any) -> list[Call]:
    """The calls that a JSON value is: one or a list, with `arguments` or, as Llama says it, `parameters`."""
    found = []
    for call in value if isinstance(value, list) else [value]:
        if isinstance(call, Mapping) and "arguments" not in call and "parameters" in call:
            call = {**call, "arguments": call["parameters"]}
        try:
            found.append(to_call(call, "the call"))
        except (BadRecord, RecursionError):
            return []
    return found


class MarkedJSON(Dialect):
    """After `opening`, one object or several with `name` and `arguments`."""

    def object_of(self, call: Call) -> str:
        """One call as JSON text."""
        return dump({"name": call.name, "arguments": call.arguments})

    def read(self, text: str, mark: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> tuple[list[Call], int]:
        """The objects that follow each other; the mark that closes them may be missing."""
        calls: list[Call] = []
        at = mark.end()
        while (value := json_at(text, at)) and (found := calls_in(value[0])):
            calls += found
            at = value[1]
        return calls, at


class BareJSON(Dialect):
    """Calls are JSON and nothing marks them: all from the first call to the end of the answer must be calls."""

    opening = re.compile(r'(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*[\[{](?=\s*[{"])')
    arguments = "arguments"

    def object_of(self, call: Call) -> dict[str, Any]:
        """One call as it is written."""
        return {"name": call.name, self.arguments: call.arguments}

    def read(self, text: str, mark: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> tuple[list[Call], int]:
        """All calls up to the end of the answer; the bracket that closes a list may be missing."""
        begin = mark.end() - 1
        calls = _all_calls(text, begin)
        if not calls and text[begin] == "[":
            calls = _all_calls(text, begin + 1)
        return calls, len(text)


def _all_calls(text: str, at: int) -> list[Call]:
    """The calls that follow each other from `at` to the end; none where there is anything else."""
    calls: list[Call] = []
    while at < len(text):
        value = json_at(text, at)
        found = calls_in(value[0]) if value else []
        if not value or not found:
            return []
        calls += found
        at = past(_JOINT, text, value[1])
    return calls
