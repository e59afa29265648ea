"""OpenVINO, in this process: a GGUF file on Intel's (and other) processors, many answers in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finery.engines.base import Ask, Engine, EngineOptions, Source, Token
from finery.engines.functions.asked import config_of, plain_positions_of, refuse
from finery.engines.functions.given import JsonDict
from finery.engines.functions.served_gguf import check_gguf, served_gguf
from finery.engines.functions.stepping import SteppingEngine
from finery.errors import UserError
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finery.engines.functions.answers import Answer

__all__ = ["OpenVino"]

Loaded = TypeVar("Loaded")

_READS = "it reads the families llama, qwen2 and qwen3, in q8_0, f16 and some formats of 4 bits"
_NO_ROOM = "OpenVINO has no room for the keys and values of this answer: give it more as 'openvino_config' ({cache_size: GB})"


class OpenVino(SteppingEngine):
    """`ContinuousBatchingPipeline` of openvino-genai (2026.4), driven step by step: token ids go in and come out."""

    class Options(OptionGroup):
        openvino_config: JsonDict = {}
        """Settings of OpenVINO's device ({EXECUTION_MODE_HINT: PERFORMANCE}: faster, and rounded to 8 bits in more places) and of its
        scheduler ({cache_size: 4}, in GB), by their own names, and DEVICE: CPU, GPU …; they count before all others."""

        def check(self, run: Any) -> Iterator[Finding]:
            """See `check_gguf`."""
            yield from check_gguf(run)

    @classmethod
    def open(cls, source: Source, options: Any) -> Engine:
        """From the GGUF file that the run names, or one that is written first; raises `UserError` where OpenVINO cannot read it."""
        from finery.compat import need

        need("openvino_genai", "'infer_backend: openvino'")
        longest = plain_positions_of(config_of(source), "openvino")
        pipeline = open_pipeline(served_gguf(source, "q8_0"), options.openvino_config, source.shared)
        return cls(pipeline, source.tokenizer, source.stop_ids, longest, source.shared.max_batch_size)

    def __init__(self, pipeline: Any, tokenizer: Any, stop_ids: frozenset[int], longest: int, most_answers: int) -> None:
        super().__init__(tokenizer, stop_ids, longest, most_answers)
        self.pipeline = pipeline
        self._handles: dict[int, Any] = {}  # of answers that are written, by `id`
        self._number = 0

    def _refuse(self, ask: Ask) -> None:
        if ask.constraint is not None:
            raise refuse("openvino", "hold an answer to a form (a schema, a call of a tool)")
        if ask.num_logprobs:
            raise refuse("openvino", "tell the likeliest tokens, only the probability of the one that came ('top_logprobs': 0)")
        if ask.options.presence_penalty or ask.options.frequency_penalty:  # it adds them to scores below 0 instead of taking them off
            raise refuse("openvino", "take a 'presence_penalty' or 'frequency_penalty' as OpenAI means it (a 'repetition_penalty' it can)")

    def _start(self, answer: Answer) -> None:
        import numpy as np
        import openvino

        self._number += 1
        ids = openvino.Tensor(np.array([answer.ask.prompt_ids], dtype=np.int64))
        self._handles[id(answer)] = self.pipeline.add_request(self._number, ids, generation_config(answer))

    def _step(self) -> None:
        from openvino_genai import GenerationStatus

        self.pipeline.step()
        for answer in list(self._answers):
            handle = self._handles[id(answer)]
            status = handle.get_status()
            for output in handle.read().values() if handle.can_read() else ():
                if take(answer, output.generated_ids, output.generated_log_probs):
                    self._leave(answer)
                    break
            else:
                if status == GenerationStatus.IGNORED:
                    self._leave(answer)
                    answer.stream.put(UserError(_NO_ROOM))
        if not self._answers:
            self._forget()

    def _stop(self, answer: Answer) -> None:
        if (handle := self._handles.pop(id(answer), None)) is not None:
            handle.cancel()

    def _forget(self) -> None:
        """What was cancelled is let go in the next step."""
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()

    def _release(self) -> None:
        self._forget()
        del self.pipeline

    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """There are none: its model gives scores alone."""
        raise refuse("openvino", "make embeddings")


def open_pipeline(file: Path, config: dict[str, Any], shared: EngineOptions) -> Any:
    """The loaded model; raises `UserError`."""
    import openvino_genai as genai

    properties = {"EXECUTION_MODE_HINT": "ACCURACY"} | config
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = shared.max_batch_size
    scheduler.max_num_batched_tokens = shared.prefill_chunk + shared.max_batch_size
    for name in [name for name in properties if hasattr(scheduler, name)]:
        setattr(scheduler, name, properties.pop(name))
    device = properties.pop("DEVICE", "CPU")
    try:
        return loaded_apart(lambda: genai.ContinuousBatchingPipeline(file, scheduler, device, properties))
    except (RuntimeError, TypeError, IndexError) as error:  # what it does not find in a file is an index error
        said = [line for line in str(error).splitlines() if line and not line.startswith(("Exception from", "Check "))]
        raise UserError(f"OpenVINO cannot serve {file}: {said[0] if said else error}; {_READS}") from None


def loaded_apart(load: Callable[[], Loaded]) -> Loaded:
    """Load with OpenVINO in a thread that ends then.

    Its plugin for processors gives the thread in which it is loaded a stack for signals of the plugin's own, and unmaps that when it is
    closed, in whatever thread. Where another thread closes it, the first one's signals are then handled on memory that belongs to others.
    """
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(load).result()


def generation_config(answer: Answer) -> Any:
    """How tokens are drawn; where they end is looked at here, so that all engines end alike."""
    import openvino_genai as genai
    import torch

    ask, o = answer.ask, answer.ask.options
    config = genai.GenerationConfig()
    config.max_new_tokens = answer.most
    config.ignore_eos = True
    config.repetition_penalty = o.repetition_penalty
    config.logprobs = 0 if ask.num_logprobs is None else 1
    config.do_sample = not o.greedy and o.min_p < 1
    if config.do_sample:
        config.temperature, config.top_p, config.top_k, config.min_p = o.temperature, o.top_p, o.top_k, o.min_p
        config.rng_seed = (int(torch.randint(2**62, ())) if ask.seed is None else ask.seed) & (2**63 - 1)
    return config


def take(answer: Answer, ids: Sequence[int], logprobs: Sequence[float]) -> bool:
    """Hand new tokens on; whether the answer has ended."""
    tells = answer.ask.num_logprobs is not None
    return any(answer.take(Token(token, logprob if tells else None)) for token, logprob in zip(ids, logprobs, strict=True))
