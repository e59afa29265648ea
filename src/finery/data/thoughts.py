"""Thoughts in the answers of named templates: which are kept, and where an answer without one gets an empty one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finery.data.slots import Slots
    from finery.data.template import TemplateOptions


@dataclass(frozen=True)
class Thinking:
    """What becomes of the thoughts in a conversation, the same in training and serving.

    `enabled` says whether the model is to think: with True, an answer without a thought learns to open and close an
    empty one; with False, thoughts are taken out and the empty one is read; with None, thoughts are kept and the empty
    one is read, so that a prompt with it asks for an answer without a thought. With `strip_history`, only the last
    answer has its thought, and the others none at all.
    """

    enabled: bool | None
    strip_history: bool
    opening: str
    closing: str
    empty: str

    @classmethod
    def of(cls, options: "TemplateOptions", slots: "Slots", strip_history: bool) -> "Thinking":
        """By the words of a template."""
        opening, closing = slots.thought_words
        empty = opening + closing if slots.empty_thought is None else slots.empty_thought
        return cls(options.enable_thinking, strip_history and not options.preserve_thinking, opening, closing, empty)

    def before_answer(self, thinks: bool) -> list[str]:
        """What a prompt ends with; `thinks` is asked only where nothing is settled."""
        return [] if self.enabled or (self.enabled is None and thinks) else [self.empty]

    def of_answer(self, text: str, last: bool) -> tuple[str, list[str], list[str]]:
        """An answer's text as it is written, and the empty thought before it where it is read, and where it is learnt."""
        past = self.strip_history and not last
        if self.enabled is False or past:
            text = self.without(text)
        if past or (self.enabled is not False and (self.opening.strip() in text or self.closing.strip() in text)):
            return text, [], []
        return (text, [], [self.empty]) if self.enabled else (text, [self.empty], [])

    def without(self, text: str) -> str:
        """A text without its thoughts."""
        first, *rest = text.split(self.opening)
        kept = [part.split(self.closing, 1)[1] if self.closing in part else self.opening + part for part in rest]
        return "".join([first, *kept]).lstrip("\n")
