"""The one shape that every data format becomes."""

from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "function", "observation"]


@dataclass(frozen=True)
class Message:
    """One turn. A `function` turn is an assistant's tool calls, an `observation` is one tool's answer."""

    role: Role
    content: str  # of a function turn: JSON text, an object or a list of objects with `name` and `arguments`
    thought: str = ""  # what an assistant thinks before it answers, where the data keeps it apart
    before_calls: str = ""  # what an assistant says in a function turn before its calls
    train: bool | None = None  # whether an assistant's turn is learnt, where the data says so


@dataclass(frozen=True)
class Sample:
    """What one record says, for every stage: a conversation without its system text, which stands apart.

    Supervised data end with an answer, pairs and prompts with a question. What a stage needs and a sample does not
    have is the kind of row's business.
    """

    messages: tuple[Message, ...]
    system: str = ""
    tools: str = ""  # JSON text of a list of function schemas
    chosen: Message | None = None  # the better and the worse of two answers
    rejected: Message | None = None
    desirable: bool | None = None  # KTO: whether the answer is one to learn or to avoid
    images: tuple[Any, ...] = ()  # paths, addresses, or objects with bytes, as the record has them
    videos: tuple[Any, ...] = ()
    audios: tuple[Any, ...] = ()
    unanswered: str = ""  # why there is no answer, where the record has none
    trailing: int = 0  # messages at the end that no answer follows, taken off

    @property
    def has_media(self) -> bool:
        """Whether there is anything but text."""
        return bool(self.images or self.videos or self.audios)


class BadRecord(ValueError):
    """Why a record cannot become a sample; the row is left out and counted, never fatal."""
