"""SGLang's interface as Finery uses it, with the signatures of SGLang 0.5.23: what it does not know is refused, as there."""

import asyncio
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from engines.fakes_model import FakeModel, chooser, install


@dataclass
class ServerArgs:
    """sglang/srt/server_args.py: those of its arguments that matter here, and some more."""

    model_path: str
    tokenizer_path: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    context_length: int | None = None
    dtype: str = "auto"
    mem_fraction_static: float | None = None
    max_running_requests: int | None = None
    tp_size: int = 1
    random_seed: int | None = None
    log_level: str = "info"
    stream_interval: int = 1
    incremental_streaming_output: bool = False
    enable_deterministic_inference: bool = False
    enable_lora: bool | None = None
    max_lora_rank: int | None = None
    lora_paths: dict[str, str] | None = None
    max_loras_per_batch: int = 8
    lora_backend: str = "csgmv"


@dataclass(kw_only=True)
class SamplingParams:
    """sglang/srt/sampling/sampling_params.py, and what it verifies."""

    max_new_tokens: int | None = 128
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 1 << 30
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None

    def __post_init__(self) -> None:
        if 0 <= self.temperature < 1e-6:
            self.temperature, self.top_k = 1.0, 1
        if self.top_k == -1:
            self.top_k = 1 << 30

    def verify(self, vocab_size: int) -> None:
        """What the tokenizer manager does with every request."""
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be a non-negative finite number, got {self.temperature}.")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1 or self.top_k < 1:
            raise ValueError("top_p, min_p or top_k")
        if not 0 < self.repetition_penalty <= 2:
            raise ValueError(f"repetition_penalty must be in (0, 2] (1.0 = no penalty), got {self.repetition_penalty}.")


class TokenizerManager:
    """Takes abortions."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """Of one request, or of all."""
        self.aborted.append(rid)


class Engine:
    """sglang/srt/entrypoints/engine.py."""

    def __init__(self, **kwargs: Any) -> None:
        if unknown := kwargs.keys() - {one.name for one in fields(ServerArgs)}:
            raise TypeError(f"ServerArgs.__init__() got an unexpected keyword argument {min(unknown)!r}")
        self.server_args = ServerArgs(**kwargs)
        self.tokenizer_manager = TokenizerManager()
        self.model = FakeModel(Path(self.server_args.model_path), self.server_args.lora_paths or {})
        self.is_shut = False
        self.fails: str | None = None

    async def async_generate(  # noqa: PLR0913 -- as there
        self,
        prompt: Any = None,
        sampling_params: dict[str, Any] | None = None,
        input_ids: list[int] | None = None,
        image_data: Any = None,
        return_logprob: bool = False,
        logprob_start_len: int | None = None,
        top_logprobs_num: int | None = None,
        lora_path: str | None = None,
        custom_logit_processor: str | None = None,
        stream: bool = False,
        rid: str | None = None,
    ) -> Any:
        """Its answer is awaited, and then iterated."""
        params = SamplingParams(**(sampling_params or {}))
        params.verify(10**6)
        assert stream and input_ids and prompt is None and self.server_args.incremental_streaming_output
        return self._generate(list(input_ids), params, lora_path, (top_logprobs_num or 0) if return_logprob else None)

    async def _generate(self, ids: list[int], p: SamplingParams, adapter: str | None, num: int | None) -> Any:
        seed = p.sampling_seed if self.server_args.enable_deterministic_inference else None
        options = {"do_sample": p.top_k != 1, "temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k, "min_p": p.min_p}
        options |= {"presence_penalty": p.presence_penalty, "frequency_penalty": p.frequency_penalty}
        chooses = chooser(ids, seed, num, repetition_penalty=p.repetition_penalty, **options)
        for number in range(1, (p.max_new_tokens or 128) + 1):
            await asyncio.sleep(0)
            if self.fails:
                yield {"text": "", "output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": self.fails}}}
                return
            token = chooses.choose(self.model.scores(ids, adapter))
            ids.append(token.id)
            matched = not p.ignore_eos and token.id == 2
            reason = {"type": "stop", "matched": token.id} if matched else {"type": "length", "length": number}
            told: dict[str, Any] = {"finish_reason": reason if matched or number == p.max_new_tokens else None}
            if num is not None:
                told["output_token_logprobs"] = [(token.logprob, token.id, None)]
                told["output_top_logprobs"] = [[(value, id, None) for id, value in token.likeliest]]
            yield {"text": "", "output_ids": [token.id], "meta_info": told}
            if told["finish_reason"]:
                return

    def shutdown(self) -> None:
        """Ends its processes."""
        self.is_shut = True


def fake_sglang(patch: pytest.MonkeyPatch) -> None:
    """Let `sglang` be what is here."""
    install(
        patch,
        sglang={"Engine": Engine},
        sglang__srt={},
        sglang__srt__sampling={},
        sglang__srt__sampling__sampling_params={"SamplingParams": SamplingParams},
    )
