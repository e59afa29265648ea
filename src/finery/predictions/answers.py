"""Many questions to an engine at once; their answers in the questions' order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from finery.engines.base import Ask, Engine, Piece, Stream
from finery.predictions.questions import Question

IN_FLIGHT = 64
"""So many questions are with the engine at a time: more than it answers together, so that it never waits for one."""


@dataclass
class Answer:
    """What has come of an answer."""

    question: Question
    stream: Stream
    pieces: list[str] = field(default_factory=list)
    num_tokens: int = 0
    failure: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


def answered(engine: Engine, questions: Iterable[Question], ask: Callable[[Question], Ask]) -> Iterator[Answer]:
    """Each question with its whole answer, in order. Raises what the engine did; leaving the iterator ends what is not answered."""
    room = threading.Semaphore(IN_FLIGHT)
    waiting: deque[Answer] = deque()
    try:
        for question in questions:
            room.acquire()  # a long answer does not keep those behind it from being asked for
            waiting.append(_begin(engine, question, ask(question), room))
            while waiting and waiting[0].ended.is_set():
                yield _whole(waiting.popleft())
        while waiting:
            waiting[0].ended.wait()
            yield _whole(waiting.popleft())
    finally:
        for answer in waiting:
            answer.stream.close()


def _begin(engine: Engine, question: Question, ask: Ask, room: threading.Semaphore) -> Answer:
    answer = Answer(question, engine.begin(ask))

    def take(what: Piece | BaseException) -> None:
        if isinstance(what, Piece):
            answer.pieces.append(what.text)
            answer.num_tokens += len(what.tokens)
        else:
            answer.failure = what
        if answer.failure is not None or (isinstance(what, Piece) and what.finish is not None):
            answer.ended.set()
            room.release()

    answer.stream.listen(take)
    return answer


def _whole(answer: Answer) -> Answer:
    if answer.failure is not None:
        raise answer.failure
    return answer
