"""One answer on its way into a talk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal

from finery.data.dialects.base import Call
from finery.data.reading import Delta, Reader, answer_of
from finery.engines.base import Piece, Stream
from finery.talks.talk import Talk


@dataclass
class Answering:
    """Iterated, it tells what has become certain; at its end the answer stands in the talk, as far as it was said."""

    talk: Talk
    stream: Stream
    reader: Reader
    thought: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    num_tokens: int = 0
    num_thought_tokens: int = 0
    thought_seconds: float = 0.0
    first_seconds: float | None = None  # until the first token
    seconds: float = 0.0
    finish: Literal["stop", "length", "stopped"] | None = None
    _began: float = field(default_factory=time.monotonic)
    _come: SimpleQueue[Piece | BaseException | None] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.stream.listen(self._come.put)

    @property
    def tokens_per_second(self) -> float | None:
        """After the first; nothing where there are too few to say."""
        if self.first_seconds is None or self.num_tokens < 2:
            return None
        return (self.num_tokens - 1) / max(self.seconds - self.first_seconds, 1e-6)

    @property
    def thinks(self) -> bool:
        """Whether all that has come is a thought."""
        return bool(self.thought) and not self.content and not self.calls

    def stop(self) -> None:
        """The rest is not wanted; from any thread."""
        self._come.put(None)

    def __iter__(self) -> Iterator[Delta]:
        """To be iterated once. However it ends, the engine is told and the talk has its answer."""
        try:
            while self.finish is None:
                piece = self._come.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield self._take(piece)
        finally:
            self.stream.close()
            if self.finish is None:
                self._take(None)
            self.talk.messages.append(answer_of(self.thought, self.content, self.calls))

    def _take(self, piece: Piece | None) -> Delta:
        """Read a piece; nothing ends the answer where it is."""
        self.seconds = time.monotonic() - self._began
        delta = self.reader.feed(piece.text) if piece is not None else Delta()
        if piece is not None and piece.tokens and self.first_seconds is None:
            self.first_seconds = self.seconds
        self.finish = piece.finish if piece is not None else "stopped"
        if self.finish is not None:
            rest = self.reader.finish()
            delta = Delta(delta.thought + rest.thought, delta.content + rest.content, rest.calls)
        self.thought += delta.thought
        self.content += delta.content
        self.calls += delta.calls
        self.num_tokens += len(piece.tokens) if piece is not None else 0
        if self.thinks:
            self.num_thought_tokens, self.thought_seconds = self.num_tokens, self.seconds - (self.first_seconds or 0.0)
        return delta
