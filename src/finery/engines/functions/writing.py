"""Text from tokens as they come: whole characters only, and nothing that may yet turn out to be a stop text."""

from collections.abc import Sequence
from typing import Any

_OPEN = "\ufffd"
"""What the tokenizer writes for a character whose bytes are not all there."""
_MOST_OPEN = 8
"""So many tokens are waited for: what is open after that is no character at all."""


class Writer:
    """Turns the tokens of one answer into pieces of text."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.stops = [stop for stop in stops if stop]
        self.stopped = False  # a stop text has come: the answer ends before it
        self._ids: list[int] = []
        self._told, self._seen = 0, 0  # the text of ids before `_seen` is told; decoding begins at `_told`, where spaces are known
        self._held = ""  # text that a stop text may begin with

    def add(self, token: int) -> str:
        """The text that is certain now; empty where more has to come."""
        self._ids.append(token)
        before, now = self._decode(self._told, self._seen), self._decode(self._told, len(self._ids))
        if now.endswith(_OPEN) and len(self._ids) - self._seen < _MOST_OPEN:
            return ""
        self._told, self._seen = self._seen, len(self._ids)
        return self._release(now[len(before) :])

    def end(self) -> str:
        """What was held back, when nothing more comes."""
        rest = self._decode(self._told, len(self._ids))[len(self._decode(self._told, self._seen)) :]
        self._told = self._seen = len(self._ids)
        text = self._release(rest)
        text, self._held = ("" if self.stopped else text + self._held), ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        return str(self.tokenizer.decode(self._ids[start:stop], skip_special_tokens=self.skip_special_tokens)) if stop > start else ""

    def _release(self, text: str) -> str:
        if not self.stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        most = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - most :]
        return text[: len(text) - most]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
