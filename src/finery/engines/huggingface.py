"""The model itself, in this process: answers are generated together, and join and leave between tokens."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finery.engines.base import Ask, Engine, EngineOptions, Source, Stream
from finery.errors import UserError
from finery.options import OptionGroup

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from finery.engines.functions.answers import Answer

__all__ = ["HuggingFace"]


class HuggingFace(Engine):
    """Generates with a model in this process."""

    class Options(OptionGroup):
        use_kv_cache: bool = True
        """Keep keys and values between tokens; false: every token is computed from the whole text, which is slow."""

    options: Options

    @classmethod
    def open(cls, source: Source, options: Any) -> HuggingFace:
        """On the GPU where there is one."""
        import torch

        from finery.models.trained import load_answering

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_answering(source.trained, source.adapter, source.tokenizer, source.model, source.quantizing, device)
        return cls(model, source.tokenizer, source.stop_ids, options, source.shared, source.served)

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stop_ids: frozenset[int],
        options: Any,
        shared: EngineOptions | None = None,
        served: Mapping[str, Path] | None = None,
    ) -> None:
        from transformers import GenerationConfig

        from finery.engines.functions.batch import Batch
        from finery.engines.functions.beside import Adapters

        self.model = model.eval()
        self.model.generation_config = GenerationConfig()  # only the run's own keys count, not what came with the model
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.options = options
        self.shared = shared or EngineOptions.model_validate({})
        beside = Adapters(self.model, served) if served else None  # before the batch looks at how the model computes
        self.batch = Batch(self.model, self.shared.prefill_chunk, options.use_kv_cache, beside)
        self._waiting: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def adapters(self) -> Sequence[str]:
        """Those beside the model."""
        return self.batch.adapters.names if self.batch.adapters is not None else ()

    @property
    def longest(self) -> int:
        """As the model's config tells; where it does not, there is no limit."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31)

    def begin(self, ask: Ask) -> Stream:
        """Answers are taken in the order in which they are asked for, as soon as there is room."""
        from finery.engines.functions.answers import Answer

        if not ask.prompt_ids:
            raise UserError("there is nothing to answer: the prompt has no token")
        if len(ask.prompt_ids) >= self.longest:
            raise UserError(f"the prompt has {len(ask.prompt_ids):,} tokens, and the model takes {self.longest:,} with its answer")
        if ask.adapter is not None and ask.adapter not in self.adapters:
            raise UserError(f"there is no adapter {ask.adapter!r}; there are: {', '.join(self.adapters) or 'none'}")
        answer = Answer(ask, self.tokenizer, self.stop_ids, self.longest, self.model.device)
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
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """One prompt at a time, beside the answers."""
        return self.batch.embed(prompts)

    def _work(self) -> None:
        """Until there is nothing left to do for a while; the next answer starts another thread."""
        import torch

        try:
            with torch.no_grad():  # quanto takes views of packed weights, which it cannot in inference mode
                while self._take_in():
                    self.batch.step()
        except BaseException as error:
            with self._changed:
                for answer in [*self.batch.answers, *self._waiting]:
                    answer.stream.put(error)
                self._waiting.clear()
                self.batch.clear()
                self._thread = None
            if not isinstance(error, Exception):
                raise

    def _take_in(self) -> bool:
        """New answers into the batch; waits where there is nothing to do. False: it is over."""
        with self._changed:
            while not (self._waiting or self.batch.answers or self._closed):
                self._changed.wait()
            if self._closed:
                raise UserError("the engine was closed")
            while self._waiting and len(self.batch.answers) < self.shared.max_batch_size:
                answer = self._waiting.popleft()
                if not answer.stream.cancelled:
                    self.batch.add(answer)
        return True
