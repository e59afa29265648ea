"""The model itself, in this process: answers are generated together, and join and leave between tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finery.engines.base import EngineOptions, Source
from finery.engines.functions.asked import positions_of
from finery.engines.functions.stepping import SteppingEngine
from finery.options import OptionGroup

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from finery.engines.functions.answers import Answer

__all__ = ["HuggingFace"]


class HuggingFace(SteppingEngine):
    """Generates with a model in this process."""

    class Options(OptionGroup):
        use_kv_cache: bool = True
        """Keep keys and values between tokens; false: every token is computed from the whole text, which is slow."""

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

        shared = shared or EngineOptions.model_validate({})
        super().__init__(tokenizer, stop_ids, positions_of(model.config.get_text_config()), shared.max_batch_size)
        self.model = model.eval()
        self.model.generation_config = GenerationConfig()  # only the run's own keys count, not what came with the model
        self.device = model.device
        beside = Adapters(self.model, served) if served else None  # before the batch looks at how the model computes
        self.batch = Batch(self.model, shared.prefill_chunk, options.use_kv_cache, beside)

    @property
    def adapters(self) -> Sequence[str]:
        """Those beside the model."""
        return self.batch.adapters.names if self.batch.adapters is not None else ()

    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """One prompt at a time, beside the answers."""
        return self.batch.embed(prompts)

    def _start(self, answer: Answer) -> None:
        self.batch.add(answer)

    def _step(self) -> None:
        self.batch.step()
        left = set(map(id, self.batch.answers))
        self._answers = [answer for answer in self._answers if id(answer) in left]

    def _fail(self, error: Exception) -> None:
        """What the rows hold may be half of a step: all begin anew."""
        self.batch.clear()
        super()._fail(error)

    def _stop(self, answer: Answer) -> None:
        """The batch knows of it, or has forgotten all."""
