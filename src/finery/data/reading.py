"""An answer, read as it comes: its thought, its text and its calls, each told as soon as it is certain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finery.data.dialects.base import Call, Dialect, dump
from finery.data.sample import Message

if TYPE_CHECKING:
    from finery.data.template import Template


@dataclass
class Delta:
    """What has become certain."""

    thought: str = ""
    content: str = ""
    calls: Sequence[Call] = ()

    def __bool__(self) -> bool:
        return bool(self.thought or self.content or self.calls)


@dataclass
class Reader:
    """Reads one answer. What could still become the mark of a thought or of a call is held back."""

    opening: str  # of a thought
    closing: str
    opened: bool = False  # the prompt itself opens a thought
    dialect: Dialect | None = None  # nothing: calls are not looked for
    tools: Sequence[Mapping[str, Any]] = ()
    clean: Callable[[str], str] = str
    one_call: bool = False
    _step: Callable[[Delta], bool] = field(init=False)
    _held: str = ""
    _told: str = ""  # what stands before `_held` in the answer after its thought
    _fresh: bool = True  # spaces are left out

    def __post_init__(self) -> None:
        self.opening, self.closing = self.opening.strip(), self.closing.strip()
        self._step = self._thought if self.opened else self._start if self.opening else self._answer
        self._fresh = self.opened
        self._mark = _partly(self.dialect) if self.dialect is not None else None

    def feed(self, text: str) -> Delta:
        """The next piece of text."""
        delta = Delta()
        self._held += text
        while self._held and self._step(delta):
            pass
        return self._cleaned(delta)

    def finish(self) -> Delta:
        """There is no more text."""
        delta = Delta()
        if self._step == self._thought:
            delta.thought = self._held.rstrip()
        else:
            parsed = self.dialect.parse(self._told + self._held, self.tools) if self.dialect is not None else None
            said, calls = parsed or (self._told + self._held, [])
            delta.content = said[len(self._told) :]
            delta.calls = calls[:1] if self.one_call else calls
        self._held = ""
        return self._cleaned(delta)

    def _cleaned(self, delta: Delta) -> Delta:
        return Delta(self.clean(delta.thought), self.clean(delta.content), delta.calls)

    def _start(self, delta: Delta) -> bool:
        """Whether the answer begins with a thought."""
        text = self._held.lstrip()
        if text.startswith(self.opening):
            self._held, self._fresh, self._step = text.removeprefix(self.opening), True, self._thought
        elif self.opening.startswith(text):
            return False
        else:
            self._step = self._answer
        return True

    def _thought(self, delta: Delta) -> bool:
        if self._fresh:
            self._held = self._held.lstrip().removeprefix(self.opening).lstrip() if self.opened else self._held.lstrip()
            if not self._held or (self.opened and self.opening.startswith(self._held)):
                return False
            self._fresh = False
        thought, closed, rest = self._held.partition(self.closing)
        if closed:
            delta.thought += thought.rstrip()
            self._held, self._fresh, self._step = rest, True, self._answer
            return True
        safe = thought[: len(thought) - _overlap(thought, self.closing)].rstrip()
        delta.thought += safe
        self._held = thought[len(safe) :]
        return False

    def _answer(self, delta: Delta) -> bool:
        if self._fresh:
            self._held = self._held.lstrip()
            self._fresh = not self._held
        end = len(self._held)
        if self._mark is not None and self._held:
            found = self._mark.search(self._told + self._held, pos=len(self._told), partial=True)
            end = found.start() - len(self._told) if found else end
            end = len(self._held[:end].rstrip())  # spaces before a call are no part of the text
        delta.content += self._held[:end]
        self._told += self._held[:end]
        self._held = self._held[end:]
        return False


def thought_marks(template: Template, prompt: Sequence[int]) -> tuple[str, str, str]:
    """The words around a thought, and the end of a prompt, which may open one."""
    opening, closing = (word.strip() for word in template.thought_words)
    return opening, closing, str(template.tokenizer.decode(list(prompt[-16:]))).rstrip()


def reader_for(
    template: Template,
    prompt: Sequence[int],
    dialect: Dialect | None,
    tools: Sequence[Mapping[str, Any]] = (),
    clean: Callable[[str], str] = str,
) -> Reader:
    """What reads the answer to a prompt."""
    opening, closing, tail = thought_marks(template, prompt)
    return Reader(opening, closing, bool(opening) and tail.endswith(opening), dialect, tools, clean)


def answer_of(thought: str, content: str, calls: Sequence[Call]) -> Message:
    """What was read, as the message that stands in the conversation from then on; one that calls tools is a `function` message."""
    if not calls:
        return Message("assistant", content, thought)
    return Message("function", dump([{"name": call.name, "arguments": call.arguments} for call in calls]), thought, content.strip())


def _partly(dialect: Dialect) -> Any:
    """The mark at which a call may begin, as a pattern that also finds its beginning at the end of a text."""
    import regex  # comes with transformers

    return regex.compile(dialect.opening.pattern, dialect.opening.flags & (regex.MULTILINE | regex.DOTALL | regex.IGNORECASE))


def _overlap(text: str, mark: str) -> int:
    """How many letters at the end of a text may be the beginning of a mark."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
