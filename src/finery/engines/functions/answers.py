"""One answer on its way: what was asked, what has been chosen, and who reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from finery.engines.base import Ask, Piece, Stream, Token
from finery.engines.functions.writing import Writer

if TYPE_CHECKING:
    import torch


class Answer:
    """Takes token after token and hands pieces of text on."""

    def __init__(self, ask: Ask, tokenizer: Any, stop_ids: frozenset[int], longest: int, device: torch.device) -> None:
        from finery.engines.functions.choosing import Chooser

        self.ask = ask
        self.stop_ids = stop_ids
        self.chooser = Chooser(ask, device)
        self.writer = Writer(tokenizer, ask.options.skip_special_tokens, ask.stop)
        self.stream = Stream()
        self.ids: list[int] = []
        self.most = min(ask.options.max_new_tokens, longest - len(ask.prompt_ids))
        self.num_read = 0  # tokens of the prompt that are in a cache
        self._silent: list[Token] = []  # chosen, and their text is not certain yet

    @property
    def next_id(self) -> int:
        """The token that goes into the model next."""
        return self.ids[-1] if self.ids else self.ask.prompt_ids[-1]

    def take(self, token: Token) -> bool:
        """Hand on what is certain; whether the answer has ended with this token."""
        if token.id in self.stop_ids:
            self._hand_on(self.writer.end(), "stop")
            return True
        self.ids.append(token.id)
        self._silent.append(token)
        text = self.writer.add(token.id)
        if self.writer.stopped:
            self._hand_on(text, "stop")
            return True
        if len(self.ids) >= self.most:
            text += self.writer.end()
            self._hand_on(text, "stop" if self.writer.stopped else "length")
            return True
        if text:
            self._hand_on(text, None)
        return self.stream.cancelled

    def _hand_on(self, text: str, finish: Literal["stop", "length"] | None) -> None:
        self.stream.put(Piece(text, tuple(self._silent), finish))
        self._silent.clear()
