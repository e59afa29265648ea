"""The one shape that every data format becomes."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "function", "observation"]


@dataclass(frozen=True)
class Message:
    """One turn. A `function` turn is an assistant's tool call as JSON text, an `observation` is a tool's answer."""

    role: Role
    content: str


@dataclass(frozen=True)
class Sample:
    """A conversation without its system text, which stands apart, and the place where it was read."""

    messages: tuple[Message, ...]
    system: str = ""
    tools: str = ""  # JSON text of a list of function schemas
    dataset: str = ""
    row: int = 0  # 0-based in its file


class BadRecord(ValueError):
    """Why a record cannot become a sample; the row is left out and counted, never fatal."""
