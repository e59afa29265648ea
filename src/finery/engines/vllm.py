"""vLLM, for NVIDIA's and other GPUs: many answers in one batch, adapters beside the model, chosen by name."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finery.engines.base import Ask, Engine, Source, Token
from finery.engines.functions.asked import config_of, positions_of, refuse
from finery.engines.functions.given import JsonDict
from finery.engines.functions.looping import Come, LoopingEngine
from finery.engines.functions.lora_folders import base_and_adapters, most_rank
from finery.errors import UserError
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Vllm"]


class Vllm(LoopingEngine):
    """`AsyncLLM` of vLLM's V1 engine; written against vLLM 0.32."""

    class Options(OptionGroup):
        vllm_maxlen: int = Field(4096, gt=0)
        """How many tokens prompt and answer may have together."""
        vllm_gpu_util: float = Field(0.7, gt=0, le=1)
        """The share of each GPU's memory that vLLM takes."""
        vllm_enforce_eager: bool = False
        """Do without CUDA graphs: slower, and starts sooner."""
        vllm_max_lora_rank: int = Field(32, gt=0)
        """The largest rank of an adapter; it grows with those that are named."""
        vllm_config: JsonDict = {}
        """More arguments of vLLM's engine by their own names (max_num_seqs, quantization …); they count before all others."""

        def check(self, run: Any) -> Iterator[Finding]:
            """vLLM has its own ways to hold weights in few bits."""
            if run.quantization.quantization_bit:
                yield Finding("quantization_bit", "does not fit 'infer_backend: vllm': export the model with 'export_quantization_bit'")

    @classmethod
    def open(cls, source: Source, options: Any) -> Engine:
        """On all GPUs that are visible, adapters unmerged; raises `UserError`."""
        from finery.compat import need

        need("vllm", "'infer_backend: vllm'")
        from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
        from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

        base, folders, usual = base_and_adapters(source, "vllm")
        given = arguments(source, options, base, folders)
        try:
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
        except (TypeError, ValueError) as error:
            raise UserError(f"vLLM cannot serve {base} so: {error}") from None
        return cls(engine, source, folders, usual, given["max_model_len"])

    def __init__(self, engine: Any, source: Source, folders: dict[str, Path], usual: str | None, longest: int) -> None:
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        super().__init__(source.tokenizer, source.stop_ids, longest, list(source.served))
        self.engine = engine
        self.usual = usual
        self.lora = {
            name: LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))
            for number, (name, folder) in enumerate(folders.items(), 1)
        }
        self._numbers = count()

    def _wish(self, ask: Ask, most: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams  # type: ignore[import-not-found]

        if ask.constraint is not None:
            raise refuse("vllm", "hold an answer to a form (a schema, a call of a tool)")
        o = ask.options
        try:
            return SamplingParams(
                temperature=0.0 if o.greedy else o.temperature,
                top_p=o.top_p,
                top_k=o.top_k,
                min_p=o.min_p,
                presence_penalty=o.presence_penalty,
                frequency_penalty=o.frequency_penalty,
                repetition_penalty=o.repetition_penalty,
                seed=ask.seed,
                max_tokens=most,
                stop_token_ids=sorted(self.stop_ids),
                ignore_eos=True,  # those that the template names count
                logprobs=ask.num_logprobs,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
        except ValueError as error:
            raise UserError(f"vLLM cannot answer so: {error}") from None

    async def _tokens(self, ask: Ask, wish: Any) -> AsyncGenerator[Come, None]:
        name = ask.adapter or self.usual
        prompt = {"prompt_token_ids": list(ask.prompt_ids)}
        outputs = self.engine.generate(
            prompt, wish, request_id=f"finery-{next(self._numbers)}", lora_request=self.lora[name] if name else None
        )
        try:
            async for output in outputs:
                (part,) = output.outputs
                told = part.logprobs or [None] * len(part.token_ids)
                tokens = [_token(id, table, ask.num_logprobs) for id, table in zip(part.token_ids, told, strict=True)]
                if part.finish_reason not in (None, "stop", "length"):
                    raise RuntimeError(f"vLLM ended an answer: {part.finish_reason}")
                yield tokens, part.finish_reason
        finally:
            await outputs.aclose()

    def _release(self) -> None:
        self.engine.shutdown()

    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """There are none: an engine of vLLM either generates or embeds."""
        raise refuse("vllm", "make embeddings beside answers")


def arguments(source: Source, options: Vllm.Options, base: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """What vLLM's engine is given."""
    import torch

    given: dict[str, Any] = {
        "model": str(base),
        "tokenizer": str(source.trained.tokenizer_folder),
        "trust_remote_code": source.model.trust_remote_code,
        "dtype": source.model.infer_dtype,
        "max_model_len": min(options.vllm_maxlen, positions_of(config_of(source))),
        "gpu_memory_utilization": options.vllm_gpu_util,
        "enforce_eager": options.vllm_enforce_eager,
        "tensor_parallel_size": max(1, torch.cuda.device_count()),
        "generation_config": "vllm",  # only the run's own keys count, not what came with the model
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if folders:
        rank = rank_for(max(options.vllm_max_lora_rank, most_rank(folders)))
        given |= {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": rank}
    return given | options.vllm_config


def rank_for(rank: int) -> int:
    """vLLM has kernels for these ranks; what an adapter lacks to the next one is filled with zeros."""
    known = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    fits = [each for each in known if each >= rank]
    if not fits:
        raise UserError(f"vLLM takes adapters of a rank up to {known[-1]}, found {rank}: merge it (`finery export`)")
    return fits[0]


def _token(id: int, table: Any, count: int | None) -> Token:
    """`table` holds the likeliest tokens and the one that came, by id."""
    if table is None or count is None:
        return Token(id)
    ranked = sorted(table.items(), key=lambda entry: -entry[1].logprob)
    likeliest = tuple((other, entry.logprob) for other, entry in ranked[:count])
    return Token(id, table[id].logprob, likeliest)
