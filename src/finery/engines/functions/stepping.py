"""Engines that make tokens step by step, in a thread of their own: answers join and leave between steps."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any

from finery.engines.base import Ask, Engine, Stream
from finery.engines.functions.asked import look_at
from finery.errors import UserError

if TYPE_CHECKING:  # torch comes when an engine begins to work: keys are read without it
    from finery.engines.functions.answers import Answer


class SteppingEngine(Engine):
    """Answers wait until there is room, then `_start`; `_step` makes a token of each and `_leave`s those that have ended."""

    device: Any = "cpu"  # of the scores

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], longest: int, most_answers: int) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.most_answers = most_answers
        self._longest = longest
        self._answers: list[Answer] = []
        self._waiting: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def longest(self) -> int:
        """As the model's config tells."""
        return self._longest

    @abstractmethod
    def _start(self, answer: Answer) -> None:
        """Take an answer up; what is wrong with it is raised."""

    @abstractmethod
    def _step(self) -> None:
        """A token of every answer in `_answers`, or a part of its prompt."""

    @abstractmethod
    def _stop(self, answer: Answer) -> None:
        """Forget what is kept of an answer; it is in `_answers` no more."""

    def _release(self) -> None:
        """Give the model's memory back; no step is under way."""

    def _refuse(self, ask: Ask) -> None:
        """Raise `UserError` for what this engine cannot do."""

    def _has_room(self, answer: Answer) -> bool:
        return len(self._answers) < self.most_answers

    def begin(self, ask: Ask) -> Stream:
        """Answers are taken up in the order in which they are asked for."""
        from finery.engines.functions.answers import Answer

        look_at(ask, self.longest, self.adapters)
        self._refuse(ask)
        answer = Answer(ask, self.tokenizer, self.stop_ids, self.longest, self.device)
        with self._changed:
            if self._closed:
                raise UserError("the engine is closed")
            self._waiting.append(answer)
            if self._thread is None or not self._thread.is_alive():  # a process that was forked has to start its own
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
            self._changed.notify()
        return answer.stream

    def close(self) -> None:
        """End all answers; those that read them are told."""
        with self._changed:
            closed, self._closed = self._closed, True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        if not closed:
            self._release()

    def _work(self) -> None:
        import torch

        while self._take_in():
            try:
                with torch.no_grad():  # quanto takes views of packed weights, which it cannot in inference mode
                    self._step()
            except Exception as error:
                self._fail(error)
        with self._changed:
            self._answers += self._waiting
            self._waiting.clear()
        self._fail(UserError("the engine was closed"))

    def _fail(self, error: Exception) -> None:
        for answer in list(self._answers):
            self._leave(answer)
            answer.stream.put(error)

    def _leave(self, answer: Answer) -> None:
        self._answers.remove(answer)
        self._stop(answer)

    def _take_in(self) -> bool:
        """New answers; waits where there is nothing to do. False: it is over."""
        with self._changed:
            while not (self._waiting or self._answers or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            new = []
            while self._waiting and (self._waiting[0].stream.cancelled or self._has_room(self._waiting[0])):
                answer = self._waiting.popleft()
                if not answer.stream.cancelled:
                    self._answers.append(answer)
                    new.append(answer)
        for answer in new:
            try:
                self._start(answer)
            except Exception as error:
                self._leave(answer)
                answer.stream.put(error)
        return True
