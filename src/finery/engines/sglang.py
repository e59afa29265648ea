"""SGLang, for NVIDIA's and other GPUs: many answers in one batch, adapters beside the model, chosen by name."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finery.engines.base import Ask, Engine, Source, Token
from finery.engines.functions.asked import config_of, positions_of, refuse
from finery.engines.functions.given import JsonDict
from finery.engines.functions.looping import Come, LoopingEngine
from finery.engines.functions.lora_folders import base_and_adapters
from finery.errors import UserError
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SgLang"]


class SgLang(LoopingEngine):
    """`sglang.Engine` in this process, and its own processes beside it; written against SGLang 0.5.23."""

    class Options(OptionGroup):
        sglang_maxlen: int = Field(4096, gt=0)
        """How many tokens prompt and answer may have together."""
        sglang_mem_fraction: float = Field(0.7, gt=0, lt=1)
        """The share of each GPU's memory that SGLang takes for weights, keys and values."""
        sglang_tp_size: int = Field(-1, ge=-1)
        """On how many GPUs the model is laid out; -1: on all that are visible."""
        sglang_config: JsonDict = {}
        """More arguments of SGLang's engine by their own names (max_running_requests, enable_deterministic_inference …); they count before
        all others."""
        sglang_lora_backend: Literal["triton", "flashinfer", "csgmv", "torch_native"] = "triton"
        """What computes adapters. (SGLang 0.5.23 has no flashinfer any more.)"""

        def check(self, run: Any) -> Iterator[Finding]:
            """SGLang has its own ways to hold weights in few bits; no number of GPUs is none."""
            if run.quantization.quantization_bit:
                yield Finding("quantization_bit", "does not fit 'infer_backend: sglang': export the model with 'export_quantization_bit'")
            if self.sglang_tp_size == 0:
                yield Finding("sglang_tp_size", "should be -1, or a number of GPUs, found 0")

    @classmethod
    def open(cls, source: Source, options: Any) -> Engine:
        """Adapters unmerged; raises `UserError`."""
        from finery.compat import need

        # before it is imported: logprobs are to be those of the model itself, whatever the temperature
        os.environ.setdefault("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        sglang: Any = need("sglang", "'infer_backend: sglang'")

        base, folders, usual = base_and_adapters(source, "sglang")
        given = arguments(source, options, base, folders)
        try:
            engine = sglang.Engine(**given)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"SGLang cannot serve {base} so: {error}") from None
        return cls(engine, source, usual, given)

    def __init__(self, engine: Any, source: Source, usual: str | None, given: dict[str, Any]) -> None:
        super().__init__(source.tokenizer, source.stop_ids, given["context_length"], list(source.served))
        self.engine = engine
        self.usual = usual
        self.takes_seeds = bool(given.get("enable_deterministic_inference"))
        self._numbers = count()

    def _wish(self, ask: Ask, most: int) -> Any:
        from sglang.srt.sampling.sampling_params import SamplingParams  # type: ignore[import-not-found]

        if ask.constraint is not None:
            raise refuse("sglang", "hold an answer to a form (a schema, a call of a tool)")
        o = ask.options
        if ask.seed is not None and not o.greedy and not self.takes_seeds:
            raise refuse("sglang", "draw by a 'seed' without 'sglang_config: {enable_deterministic_inference: true}'")
        wish: dict[str, Any] = {
            "temperature": 0.0 if o.greedy else o.temperature,
            "top_p": o.top_p,
            "top_k": o.top_k or -1,
            "min_p": o.min_p,
            "presence_penalty": o.presence_penalty,
            "frequency_penalty": o.frequency_penalty,
            "repetition_penalty": o.repetition_penalty,
            "max_new_tokens": most,
            "ignore_eos": True,  # those that the template names end an answer, here
        }
        if ask.seed is not None:
            wish["sampling_seed"] = ask.seed & (2**31 - 1)
        try:
            SamplingParams(**wish).verify(len(self.tokenizer))
        except ValueError as error:
            raise UserError(f"SGLang cannot answer so: {error}") from None
        return wish

    async def _tokens(self, ask: Ask, wish: Any) -> AsyncGenerator[Come, None]:
        name = f"finery-{next(self._numbers)}"
        tells = ask.num_logprobs is not None
        ended = False
        outputs = await self.engine.async_generate(
            input_ids=list(ask.prompt_ids),
            sampling_params=wish,
            stream=True,
            rid=name,
            lora_path=ask.adapter or self.usual,
            return_logprob=tells,
            top_logprobs_num=ask.num_logprobs or 0,
        )
        try:
            async for output in outputs:
                told = output["meta_info"]
                reason = told.get("finish_reason")
                ended = reason is not None
                if ended and reason["type"] not in ("stop", "length"):
                    raise RuntimeError(f"SGLang ended an answer: {reason.get('message') or reason['type']}")
                yield _tokens(output["output_ids"], told, ask.num_logprobs), reason["type"] if reason else None
        finally:
            if not ended:
                self.engine.tokenizer_manager.abort_request(name)
            await outputs.aclose()

    def _release(self) -> None:
        self.engine.shutdown()

    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """There are none: an engine of SGLang either generates or embeds."""
        raise refuse("sglang", "make embeddings beside answers")


def arguments(source: Source, options: SgLang.Options, base: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """What SGLang's engine is given."""
    import torch

    given: dict[str, Any] = {
        "model_path": str(base),
        "tokenizer_path": str(source.trained.tokenizer_folder),
        "trust_remote_code": source.model.trust_remote_code,
        "dtype": source.model.infer_dtype,
        "context_length": min(options.sglang_maxlen, positions_of(config_of(source))),
        "mem_fraction_static": options.sglang_mem_fraction,
        "tp_size": max(1, torch.cuda.device_count()) if options.sglang_tp_size < 1 else options.sglang_tp_size,
        "incremental_streaming_output": True,
    }
    if folders:
        given |= {
            "lora_paths": {name: str(folder) for name, folder in folders.items()},
            "lora_backend": options.sglang_lora_backend,
            "max_loras_per_batch": max(8, len(folders) + 1),  # those that answer without one count, too
        }
    return given | options.sglang_config


def _tokens(ids: Sequence[int], told: dict[str, Any], num_logprobs: int | None) -> list[Token]:
    if num_logprobs is None:
        return [Token(id) for id in ids]
    chosen = told["output_token_logprobs"]  # of each: its logprob, its id, its text
    likeliest = told["output_top_logprobs"] if num_logprobs else [()] * len(ids)
    return [
        Token(id, float(one[0]), tuple((int(entry[1]), float(entry[0])) for entry in best))
        for id, one, best in zip(ids, chosen, likeliest, strict=True)
    ]
