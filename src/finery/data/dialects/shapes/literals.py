"""Values written much like JSON, where a dialect spells strings and keys in its own way."""

import re
from collections.abc import Callable
from typing import Any

from finery.data.dialects.shapes.json_calls import SPACE, json_at, past

_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_ATOM = re.compile(r"[\w.+-]+")


class Literals:
    """Reads values by what a string and a key look like; both raise `ValueError` at text that is none."""

    def __init__(self, string: str, key: str, unquote: Callable[[str], str]) -> None:
        self._string = re.compile(string, re.DOTALL)
        self._key = re.compile(key)
        self._unquote = unquote

    def value(self, text: str, at: int) -> tuple[Any, int]:
        """The value at `at`, after spaces, and where it ends."""
        at = past(SPACE, text, at)
        if string := self._string.match(text, at):
            return self._unquote(string[0]), string.end()
        if text.startswith("{", at):
            return self.pairs(text, at + 1, ":", "}")
        if text.startswith("[", at):
            return self._list(text, at + 1)
        atom = _ATOM.match(text, at)
        if atom and atom[0] in _WORDS:
            return _WORDS[atom[0]], atom.end()
        number = json_at(text, at) if atom else None
        if not number:
            raise ValueError(f"no value at {at}")
        return number

    def pairs(self, text: str, at: int, joint: str, close: str) -> tuple[dict[str, Any], int]:
        """Keys and values up to `close`, and where it ends."""
        found: dict[str, Any] = {}
        while not text.startswith(close, at := past(SPACE, text, at)):
            if string := self._string.match(text, at):
                key, at = self._unquote(string[0]), string.end()
            elif bare := self._key.match(text, at):
                key, at = bare[0].strip(), bare.end()
            else:
                raise ValueError(f"no key at {at}")
            at = past(SPACE, text, at)
            if not text.startswith(joint, at):
                raise ValueError(f"no {joint!r} at {at}")
            found[key], at = self.value(text, at + len(joint))
            at = _after_comma(text, at, close)
        return found, at + len(close)

    def _list(self, text: str, at: int) -> tuple[list[Any], int]:
        found = []
        while not text.startswith("]", at := past(SPACE, text, at)):
            value, at = self.value(text, at)
            found.append(value)
            at = _after_comma(text, at, "]")
        return found, at + 1


def _after_comma(text: str, at: int, close: str) -> int:
    at = past(SPACE, text, at)
    if text.startswith(",", at):
        return at + 1
    if not text.startswith(close, at):
        raise ValueError(f"no ',' at {at}")
    return at
