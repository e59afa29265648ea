"""vLLM's interface as Finery uses it, with the signatures of vLLM 0.32: what it does not know is refused, as there."""

import asyncio
import enum
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engines.fakes_model import FakeModel, chooser, install

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """vllm/sampling_params.py, and what its __post_init__ checks."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1 or self.top_k < -1:
            raise ValueError("top_p, min_p or top_k")
        if not -2 <= self.presence_penalty <= 2 or not -2 <= self.frequency_penalty <= 2 or self.repetition_penalty <= 0:
            raise ValueError("a penalty")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")


@dataclass
class LoRARequest:
    """vllm/lora/request.py."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    tensorizer_config_dict: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"


@dataclass
class AsyncEngineArgs:
    """vllm/engine/arg_utils.py: those of its arguments that matter here, and some more."""

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    seed: int | None = 0
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int | None = None
    enable_prefix_caching: bool | None = None
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    disable_log_stats: bool = False
    quantization: str | None = None
    enforce_eager: bool = False
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    generation_config: str = "auto"
    enable_log_requests: bool = False


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class AsyncLLM:
    """vllm/v1/engine/async_llm.py."""

    args: AsyncEngineArgs
    aborted: list[str] = field(default_factory=list)
    is_shut: bool = False
    models: dict[str, FakeModel] = field(default_factory=dict)
    fails: str | None = None

    @classmethod
    def from_engine_args(
        cls, engine_args: AsyncEngineArgs, start_engine_loop: bool = True, usage_context: Any = None, stat_loggers: Any = None
    ) -> "AsyncLLM":
        """Loads the model."""
        if engine_args.enable_lora and engine_args.max_lora_rank not in RANKS:
            raise ValueError(f"max_lora_rank ({engine_args.max_lora_rank}) must be one of {RANKS}.")
        engine = cls(engine_args)
        plain = FakeModel(Path(engine_args.model), {})
        if (engine_args.max_model_len or 0) > plain.longest:
            raise ValueError(f"max_model_len ({engine_args.max_model_len}) is greater than the derived max_model_len")
        engine.models[""] = plain
        return engine

    async def generate(  # noqa: PLR0913 -- as there
        self,
        prompt: Mapping[str, Any],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """A token at a time; a token that stops is told."""
        p = sampling_params
        assert p.output_kind == RequestOutputKind.DELTA and p.n == 1 and not p.stop
        assert lora_request is None or self.args.enable_lora
        if lora_request is not None and lora_request.lora_name not in self.models:
            self.models[lora_request.lora_name] = FakeModel(Path(self.args.model), {lora_request.lora_name: lora_request.lora_path})
        name = lora_request.lora_name if lora_request else ""
        options = {"do_sample": p.temperature > 0, "temperature": p.temperature, "top_p": p.top_p, "top_k": max(p.top_k, 0)}
        options |= {"min_p": p.min_p, "presence_penalty": p.presence_penalty, "frequency_penalty": p.frequency_penalty}
        ids = list(prompt["prompt_token_ids"])
        chooses = chooser(ids, p.seed, p.logprobs, repetition_penalty=p.repetition_penalty, **options)
        finish = None
        try:
            for number in range(1, (p.max_tokens or 16) + 1):
                await asyncio.sleep(0)
                if self.fails:
                    raise RuntimeError(self.fails)
                token = chooses.choose(self.models[name].scores(ids, name or None))
                ids.append(token.id)
                stops = token.id in (p.stop_token_ids or ()) or (not p.ignore_eos and token.id == 2)
                finish = "stop" if stops else "length" if number == p.max_tokens else None
                table = None
                if p.logprobs is not None:
                    table = [{token.id: Logprob(token.logprob or 0.0)} | {id: Logprob(value) for id, value in token.likeliest}]
                part = CompletionOutput(0, "", [token.id], None, table, finish)
                yield RequestOutput(request_id, None, None, None, [part], finish is not None)
                if finish:
                    return
        finally:
            if finish is None:
                self.aborted.append(request_id)

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends its processes."""
        self.is_shut = True


def fake_vllm(patch: pytest.MonkeyPatch) -> None:
    """Let `vllm` be what is here."""
    install(
        patch,
        vllm={},
        vllm__engine={},
        vllm__engine__arg_utils={"AsyncEngineArgs": AsyncEngineArgs},
        vllm__v1={},
        vllm__v1__engine={},
        vllm__v1__engine__async_llm={"AsyncLLM": AsyncLLM},
        vllm__lora={},
        vllm__lora__request={"LoRARequest": LoRARequest},
        vllm__sampling_params={"SamplingParams": SamplingParams, "RequestOutputKind": RequestOutputKind},
    )
