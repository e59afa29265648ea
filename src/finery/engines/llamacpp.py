"""llama.cpp, in this process: a GGUF file on any machine, many answers in one batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finery.engines.base import Engine, EngineOptions, Source
from finery.engines.functions.asked import config_of, positions_of
from finery.engines.functions.given import JsonDict
from finery.engines.functions.served_gguf import check_gguf, served_gguf
from finery.engines.functions.stepping import SteppingEngine
from finery.errors import UserError
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finery.engines.functions.answers import Answer
    from finery.engines.functions.llama_context import LlamaContext, Part

__all__ = ["LlamaCpp"]


class LlamaCpp(SteppingEngine):
    """llama.cpp computes scores; tokens are chosen from them as by the engine huggingface, so that every option means the same."""

    class Options(OptionGroup):
        llamacpp_cache_tokens: int = Field(16384, gt=0)
        """So many tokens' keys and values are kept, of all answers together: memory is reserved for them. An answer waits until all that it
        may need is free."""
        llamacpp_config: JsonDict = {}
        """Settings of llama.cpp by the names of llama.h (n_gpu_layers, n_threads, type_k …); they count before all others."""

        def check(self, run: Any) -> Iterator[Finding]:
            """See `check_gguf`."""
            yield from check_gguf(run)

    @classmethod
    def open(cls, source: Source, options: Any) -> Engine:
        """From the GGUF file that the run names, or one that is written first; raises `UserError` where llama.cpp cannot read it."""
        from finery.compat import need
        from finery.engines.functions.llama_context import LlamaContext

        need("llama_cpp", "'infer_backend: llamacpp'")
        file, shared, cells = served_gguf(source, "f16"), source.shared, options.llamacpp_cache_tokens
        context = LlamaContext(file, cells, shared, options.llamacpp_config)
        return cls(context, source.tokenizer, source.stop_ids, min(positions_of(config_of(source)), context.num_cells), shared)

    def __init__(self, context: LlamaContext, tokenizer: Any, stop_ids: frozenset[int], longest: int, shared: EngineOptions) -> None:
        super().__init__(tokenizer, stop_ids, longest, shared.max_batch_size)
        self.context = context
        self.prefill_chunk = shared.prefill_chunk
        self._rows: dict[int, int] = {}  # sequences of answers, by `id`
        self._lock = threading.Lock()  # of the model, which embeddings use, too

    def _has_room(self, answer: Answer) -> bool:
        needed = sum(len(each.ask.prompt_ids) + each.most for each in [*self._answers, answer])
        return super()._has_room(answer) and needed <= self.context.num_cells

    def _start(self, answer: Answer) -> None:
        self._rows[id(answer)] = next(row for row in range(self.most_answers) if row not in self._rows.values())

    def _step(self) -> None:
        for answer in [answer for answer in self._answers if answer.stream.cancelled]:
            self._leave(answer)
        answers, parts = self._parts()
        if not parts:
            return
        with self._lock:
            found = self.context.decode(parts)
        for answer, part, scores in zip(answers, parts, found, strict=True):
            answer.num_read += len(part.ids) if not answer.ids else 0
            if scores is None:
                continue
            try:
                ended = answer.take(answer.chooser.choose(scores))
            except Exception as error:  # of its constraint: the fault is its own
                answer.stream.put(error)
                ended = True
            if ended:
                self._leave(answer)

    def _parts(self) -> tuple[list[Answer], list[Part]]:
        """A token of each answer that is written; of prompts, in order, as much as there is room for."""
        from finery.engines.functions.llama_context import Part

        answers, parts, room = [], [], self.prefill_chunk
        for answer in self._answers:
            prompt, row = answer.ask.prompt_ids, self._rows[id(answer)]
            if answer.ids:
                part = Part(row, len(prompt) + len(answer.ids) - 1, [answer.ids[-1]], True)
            else:
                ids = prompt[answer.num_read : answer.num_read + room]
                part = Part(row, answer.num_read, ids, answer.num_read + len(ids) == len(prompt))
                room -= len(ids)
            if part.ids:
                answers.append(answer)
                parts.append(part)
        return answers, parts

    def _stop(self, answer: Answer) -> None:
        if (row := self._rows.pop(id(answer), None)) is not None:
            self.context.forget(row)

    def _release(self) -> None:
        with self._lock:
            self.context.close()

    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """One prompt at a time, between the steps of answers."""
        import numpy as np

        found = []
        for ids in prompts:
            if not 0 < len(ids) <= self.longest:
                raise UserError(f"a text of 1 to {self.longest:,} tokens can be embedded, found {len(ids):,}")
            with self._lock:
                if self._closed:
                    raise UserError("the engine is closed")
                found.append(self.context.embed(ids))
        return np.stack(found)
