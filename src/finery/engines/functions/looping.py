"""Engines that answer in an asyncio loop: ours, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from abc import abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from finery.engines.base import Ask, Engine, Stream, Token
from finery.engines.functions.answers import Answer
from finery.engines.functions.asked import look_at
from finery.errors import UserError

Come = tuple[Sequence[Token], Literal["stop", "length"] | None]
"""New tokens, and why there are no more. A token that stops may be among them or not."""


class LoopingEngine(Engine):
    """Another library makes the tokens, many answers at a time; text, stop texts and ends are made of them here, as for all engines."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], longest: int, adapters: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._longest = longest
        self._adapters = tuple(adapters)
        self._closed = False
        self._tasks: dict[asyncio.Task[None], Answer] = {}
        self._turn = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    @property
    def longest(self) -> int:
        """As its keys say."""
        return self._longest

    @property
    def adapters(self) -> Sequence[str]:
        """The names of `served_adapters`."""
        return self._adapters

    @abstractmethod
    def _wish(self, ask: Ask, most: int) -> Any:
        """The library's own description of an answer of at most so many tokens; raises `UserError` for what it cannot do."""

    @abstractmethod
    def _tokens(self, ask: Ask, wish: Any) -> AsyncGenerator[Come, None]:
        """Generate in the loop; closing the generator ends the generation."""

    @abstractmethod
    def _release(self) -> None:
        """End the library's processes."""

    def begin(self, ask: Ask) -> Stream:
        """Answers are generated at once; the library decides which of them wait."""
        import torch

        look_at(ask, self.longest, self.adapters)
        answer = Answer(ask, self.tokenizer, self.stop_ids, self.longest, torch.device("cpu"))
        wish = self._wish(ask, answer.most)
        with self._turn:
            if self._closed:
                raise UserError("the engine is closed")
            self._loop.call_soon_threadsafe(self._take_up, answer, wish)
        return answer.stream

    def _take_up(self, answer: Answer, wish: Any) -> None:
        task = self._loop.create_task(self._write(answer, wish))
        self._tasks[task] = answer
        task.add_done_callback(self._tasks.pop)

    async def _write(self, answer: Answer, wish: Any) -> None:
        try:
            await self._write_all(answer, wish)
        except asyncio.CancelledError:
            answer.stream.put(UserError("the engine was closed"))
        except Exception as error:
            answer.stream.put(error)

    async def _write_all(self, answer: Answer, wish: Any) -> None:
        async with aclosing(self._tokens(answer.ask, wish)) as comes:
            async for tokens, finish in comes:
                if any(answer.take(token) for token in tokens):
                    return
                if answer.stream.cancelled:
                    return
                if finish == "stop" and self.stop_ids:  # the token that stopped it is not told
                    answer.take(Token(min(self.stop_ids)))
                    return
        raise RuntimeError(f"the engine ended an answer after {len(answer.ids)} of {answer.most} tokens")

    def close(self) -> None:
        """End all answers; those that read them are told."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._release()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_all(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
