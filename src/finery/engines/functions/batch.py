"""Answers that are generated together: a prompt is read beside the tokens of the others, then its row joins theirs.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from finery.engines.functions.answers import Answer
from finery.engines.functions.beside import Adapters
from finery.engines.functions.few_rows import serve_few_rows
from finery.engines.functions.native_step import find_native_step
from finery.engines.functions.rows import RowCache
from finery.log import get_logger

log = get_logger(__name__)

CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 5e-2}
"""How far scores of a row among others may lie from those of the same row alone: products of several rows are summed in another order."""


Way = Literal["together", "side by side", "anew"]
"""How tokens are made: of all rows at once; row by row, each with a cache of its own; or from the whole text each time."""
SAID = {
    "side by side": "this model's answers are generated side by side, not in one batch: its layers keep more than keys and values",
    "anew": "this model's answers are computed anew for every token: what its layers keep between tokens is its own affair",
}


class Batch:
    """The rows of one model."""

    def __init__(self, model: Any, prefill_chunk: int, use_cache: bool = True, adapters: Adapters | None = None) -> None:
        self.model = model
        self.adapters = adapters
        self.prefill_chunk = prefill_chunk
        self.answers: list[Answer] = []  # those that have a row, in the rows' order, and then those whose prompts are read
        self._num_rows = 0
        self._reading: list[tuple[Answer, Any]] = []  # with caches of their own
        self._alone: dict[int, Any] = {}  # caches of answers that do not share one, by `id`
        self._lock = threading.Lock()  # of the model, which embeddings use, too
        self.native = find_native_step(model) if use_cache else None
        if self.native is None:
            serve_few_rows(model)
        self.way: Way = "anew" if not use_cache else "together" if self.native is not None else way_of(model)
        self.cache: RowCache | None = RowCache(model.config) if self.way == "together" else None
        if use_cache and self.way in SAID:
            log.info("%s", SAID[self.way])

    def add(self, answer: Answer) -> None:
        """Its prompt is read from the next step on."""
        self.answers.append(answer)
        config = self.model.config
        own: Any = RowCache(config) if self.way == "together" else DynamicCache(config=config) if self.way == "side by side" else None
        self._reading.append((answer, own))

    def clear(self) -> None:
        """Forget everything."""
        self.answers.clear()
        self._reading.clear()
        self._alone.clear()
        self._num_rows = 0
        self.cache = RowCache(self.model.config) if self.cache is not None else None

    def step(self) -> None:
        """Parts of prompts, and a token of every answer that is on its way."""
        with self._lock:
            self._drop_cancelled()
            rows, reading = self.answers[: self._num_rows], self._to_read()
            parts = [*self._next_parts(rows), *(self._prompt_part(answer, cache, size) for answer, cache, size in reading)]
            if parts:
                scores_RV = self._forward(parts, self._wanted(rows, [answer for answer, _, _ in reading]))
                self._take_next(rows, scores_RV[: len(rows)])
                for (answer, cache, size), scores_V in zip(reading, scores_RV[len(rows) :], strict=True):
                    self._take_read(answer, cache, size, scores_V)

    def _to_read(self) -> list[tuple[Answer, Any, int]]:
        """Whose prompts are read now, and how many of their tokens: of one answer, or of several where one call takes them."""
        found, left = [], self.prefill_chunk
        for answer, cache in self._reading if self.native is not None else self._reading[:1]:
            missing = len(answer.ask.prompt_ids) - answer.num_read
            size = min(missing, left) if cache is not None else missing
            found.append((answer, cache, size))
            left -= size
            if left <= 0:
                break
        return found

    def _prompt_part(self, answer: Answer, cache: Any, size: int) -> tuple[Any, Tensor]:
        if isinstance(cache, RowCache):
            cache.lengths = [answer.num_read]
        return cache, self._ids([answer.ask.prompt_ids[answer.num_read : answer.num_read + size]])

    def _next_parts(self, rows: Sequence[Answer]) -> list[tuple[Any, Tensor]]:
        if self.cache is not None:
            return [(self.cache, self._ids([[answer.next_id] for answer in rows]))] if rows else []
        caches = [self._alone[id(answer)] for answer in rows]
        return [
            (cache, self._ids([[answer.next_id] if cache is not None else [*answer.ask.prompt_ids, *answer.ids]]))
            for answer, cache in zip(rows, caches, strict=True)
        ]

    def _ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.device)

    def _wanted(self, rows: Sequence[Answer], reading: Sequence[Answer]) -> list[list[Answer]]:
        """The answers of each part, in the order of their rows."""
        together = [list(rows)] if rows and self.cache is not None else [[answer] for answer in rows]
        return [*together, *([answer] for answer in reading)]

    def _forward(self, parts: Sequence[tuple[Any, Tensor]], wanted: Sequence[Sequence[Answer]]) -> Tensor:
        """The fp32 scores (R, V) after the last of some new tokens (R, new) of the rows of each cache."""
        if self.native is not None:
            return self.native(parts)
        found = []
        for (cache, ids), answers in zip(parts, wanted, strict=True):
            if self.adapters is not None:
                self.adapters.rows = [answer.ask.adapter for answer in answers]
            found.append(_forward(self.model, ids, cache))
        return torch.cat(found)

    def _take_next(self, rows: Sequence[Answer], scores_RV: Tensor) -> None:
        likeliest = scores_RV.argmax(-1).tolist() if any(answer.chooser.is_plain for answer in rows) else []
        ended = []
        for row, answer in enumerate(rows):
            if self._take(answer, scores_RV[row], likeliest[row] if answer.chooser.is_plain else None):
                ended.append(row)
        for row in reversed(ended):
            self._leave(row)

    def _take_read(self, answer: Answer, cache: Any, size: int, scores_V: Tensor) -> None:
        """Where the prompt is read, the answer begins, and its row joins the others."""
        answer.num_read += size
        if answer.num_read < len(answer.ask.prompt_ids):
            return
        self._reading.remove((answer, cache))
        self.answers.remove(answer)
        if self._take(answer, scores_V):
            return
        self.answers.insert(self._num_rows, answer)
        if self.cache is not None and isinstance(cache, RowCache):
            self.cache.join(cache)
        else:
            self._alone[id(answer)] = cache
        self._num_rows += 1

    def _leave(self, row: int) -> None:
        """The last row takes its place, as it does in the cache."""
        gone, last = self.answers[row], self._num_rows - 1
        if self.cache is not None:
            self.cache.leave(row)
        else:
            del self._alone[id(gone)]
        self.answers[row] = self.answers[last]
        del self.answers[last]
        self._num_rows -= 1

    def _drop_cancelled(self) -> None:
        for row in reversed([n for n, answer in enumerate(self.answers[: self._num_rows]) if answer.stream.cancelled]):
            self._leave(row)
        for answer, cache in [pair for pair in self._reading if pair[0].stream.cancelled]:
            self._reading.remove((answer, cache))
            self.answers.remove(answer)

    def _take(self, answer: Answer, scores_V: Tensor, likeliest: int | None = None) -> bool:
        """Whether the answer has ended with its next token; what goes wrong with one, a grammar say, is no other's fault."""
        try:
            return answer.take(answer.chooser.take(likeliest) if likeliest is not None else answer.chooser.choose(scores_V))
        except Exception as error:  # whatever it is: it is told to whoever reads this answer
            answer.stream.put(error)
            return True

    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Means of last hidden states."""
        found = []
        with self._lock, torch.no_grad():
            if self.adapters is not None:
                self.adapters.rows = ()
            for ids in prompts:
                hidden = self.model.get_decoder()(input_ids=torch.tensor([list(ids)], device=self.model.device), use_cache=False)
                found.append(hidden.last_hidden_state[0].float().mean(0).cpu().numpy())
        return np.stack(found)


def _forward(model: Any, ids: Tensor, cache: Any) -> Tensor:
    num_new = ids.shape[1]
    given: dict[str, Any] = {}
    if isinstance(cache, RowCache):
        lengths = torch.tensor(cache.lengths, device=ids.device)
        given["position_ids"] = lengths[:, None] + torch.arange(num_new, device=ids.device)[None]
        if len(set(cache.lengths)) > 1:
            given["attention_mask"] = cache.mask(ids.device, num_new)
    if cache is not None:
        given["past_key_values"] = cache
    output = model(input_ids=ids, use_cache=cache is not None, logits_to_keep=1, **given)
    if isinstance(cache, RowCache):
        cache.advance(num_new)
    return output.logits[:, -1].float()


@torch.no_grad()
def way_of(model: Any) -> Way:
    """The fastest way in which rows of different lengths get the scores of their whole texts; tried on a few random tokens."""
    size = model.get_input_embeddings().weight.shape[0]
    dice = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, size, (1, length), generator=dice).to(model.device) for length in (8, 4, 13)]
    wanted_RV = torch.cat([_forward(model, text, None) for text in texts])
    far = CLOSE.get(next(model.parameters()).dtype, 0.3) * max(float(wanted_RV.abs().max()), 1.0)
    ways: dict[Way, Callable[[], Tensor]] = {
        "together": lambda: _together(model, texts),
        "side by side": lambda: _side_by_side(model, texts),
    }
    for way, scores in ways.items():
        try:
            if float((scores() - wanted_RV).abs().max()) <= far:  # NaN is not
                return way
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError) as error:
            log.debug("not %s: %s", way, error)
    return "anew"


def _together(model: Any, texts: Sequence[Tensor]) -> Tensor:
    if not RowCache.serves(model.config):
        raise ValueError("layers keep more than keys and values")
    cache = RowCache(model.config)
    for text in texts:
        own = RowCache(model.config)
        own.lengths = [0]
        _forward(model, text[:, :-1], own)
        cache.join(own)
    return _forward(model, torch.cat([text[:, -1:] for text in texts]), cache)


def _side_by_side(model: Any, texts: Sequence[Tensor]) -> Tensor:
    found = []
    for text in texts:
        cache = DynamicCache(config=model.config)
        _forward(model, text[:, :-1], cache)
        found.append(_forward(model, text[:, -1:], cache))
    return torch.cat(found)
