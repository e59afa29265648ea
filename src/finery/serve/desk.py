"""Between requests and the engine: how many answers are taken, begun and cancelled; the engine's threads never touch the loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Self

from finery.engines.base import Ask, Engine, Piece, Stream
from finery.errors import UserError
from finery.log import get_logger
from finery.serve.metrics import Metrics
from finery.serve.refusals import Refusal, bad

log = get_logger(__name__)


class Desk:
    """Takes requests in; all of its methods belong to the loop's thread."""

    def __init__(self, engine: Engine, metrics: Metrics, max_concurrent: int | None, most_answers: int, most_seconds: float) -> None:
        """`most_answers` counts those that wait, too."""
        self.engine = engine
        self.metrics = metrics
        self.max_concurrent = max_concurrent
        self.most_answers = most_answers
        self.most_seconds = most_seconds
        self.admitted = 0
        self.running = 0
        self._waiting: deque[tuple[Answers, int]] = deque()

    @property
    def waiting(self) -> int:
        """Answers that were not begun yet."""
        return len(self._waiting)

    def open(self, asks: Sequence[Ask]) -> Answers:
        """Begin the answers of a request, or queue them; raises `Refusal`. What is returned must be closed."""
        if len(asks) > self.most_answers:
            raise bad(f"A request may ask for {self.most_answers} answers here.", "n")
        if self.admitted + len(asks) > self.most_answers:
            raise Refusal(
                429, "Too many answers are being written or wait: try again.", code="rate_limit_exceeded", headers={"Retry-After": "1"}
            )
        self.admitted += len(asks)
        self.metrics.prompt_tokens += sum(len(ids) for ids in {id(ask.prompt_ids): ask.prompt_ids for ask in asks}.values())
        answers = Answers(self, asks)
        self._waiting += [(answers, index) for index in range(len(asks))]
        try:
            self.begin_next()
        except Refusal:
            answers.close()
            raise
        return answers

    def begin_next(self) -> None:
        """Give the engine what waits, as far as may be."""
        while self._waiting and (self.max_concurrent is None or self.running < self.max_concurrent):
            answers, index = self._waiting.popleft()
            answers.begin(index)

    def forget(self, answers: Answers) -> None:
        """Take the waiting ones of a request out."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not answers)


class Answers:
    """The answers to one request on their way: pieces, each with its answer's number. `close` ends them all."""

    def __init__(self, desk: Desk, asks: Sequence[Ask]) -> None:
        self.desk = desk
        self.asks = asks
        self.num_tokens = 0
        self._left = set(range(len(asks)))
        self._streams: dict[int, Stream] = {}
        self._come: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        self._closed = False

    def begin(self, index: int) -> None:
        """Give one to the engine; what it raises comes as its only piece."""
        try:
            stream = self.desk.engine.begin(self.asks[index])
        except Exception as error:
            self._come.put_nowait((index, error))
            return
        self._streams[index] = stream
        self.desk.running += 1

        def listener(what: Piece | BaseException) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._come.put_nowait, (index, what))

        stream.listen(listener)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._left:
            index, what = await self._next()
            if isinstance(what, BaseException):
                raise _told(what)
            if not self.num_tokens and what.tokens:
                self.desk.metrics.first_token_seconds.add(time.monotonic() - self._began)
            self.num_tokens += len(what.tokens)
            self.desk.metrics.completion_tokens += len(what.tokens)
            if what.finish is not None:
                self._end(index)
            yield index, what

    async def _next(self) -> tuple[int, Piece | BaseException]:
        left = self.desk.most_seconds - (time.monotonic() - self._began)
        try:
            async with asyncio.timeout(left):
                return await self._come.get()
        except TimeoutError:
            raise Refusal(504, f"The answer took longer than {self.desk.most_seconds:g} seconds.", code="timeout") from None

    def _end(self, index: int) -> None:
        self._left.discard(index)
        self.desk.admitted -= 1
        if self._streams.pop(index, None) is not None:
            self.desk.running -= 1
            self.desk.begin_next()

    def close(self) -> None:
        """Nobody reads the rest."""
        if self._closed:
            return
        self._closed = True
        self.desk.forget(self)
        self.desk.metrics.cancelled += len(self._streams)
        for stream in self._streams.values():
            stream.close()
        for index in list(self._left):
            self._end(index)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def _told(error: BaseException) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UserError):
        return bad("; ".join(error.complaints))
    log.error("the engine failed", exc_info=error)
    return Refusal(500, "The engine failed; the server's log tells more.", code="internal_error")
