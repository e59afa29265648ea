"""One loaded model and how it is served: settings, names, prompts and what requests may ask of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from finery.data.answers import dialect_of
from finery.data.dialects.base import Dialect
from finery.data.template import Template
from finery.engines.base import Engine, GenerationOptions
from finery.errors import UserError
from finery.serve.desk import Desk
from finery.serve.grammars import Grammars
from finery.serve.metrics import Metrics
from finery.serve.protocol import CompletionRequest, Drawing
from finery.serve.refusals import Refusal, bad

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a model is served."""

    name: str
    generation: GenerationOptions
    thinking: bool | None = True  # the key enable_thinking
    key: str | None = None
    max_concurrent: int | None = None  # answers that the engine gets at once; None: it decides
    most_answers: int = 256  # that are written or wait
    most_seconds: float = 600.0  # of one answer
    most_bytes: int = 4 << 20  # of a request's body
    body_seconds: float = 60.0  # to send it
    drain_seconds: float = 30.0  # for running answers when the server is told to end
    origins: tuple[str, ...] = ()  # of web pages that may ask
    hosts: tuple[str, ...] | None = None  # names by which the server may be called; None: any
    root_path: str = ""
    verbose: bool = False  # requests are logged with their texts


class Service:
    """What all routes share."""

    def __init__(self, engine: Engine, template: Template, settings: Settings) -> None:
        self.engine = engine
        self.template = template
        self.tokenizer = template.tokenizer
        self.settings = settings
        self.metrics = Metrics()
        self.desk = Desk(engine, self.metrics, settings.max_concurrent, settings.most_answers, settings.most_seconds)
        self.grammars = Grammars(self.tokenizer, template.stop_ids)
        self.created = int(time.time())
        self.draining = False
        self.num_requests = 0  # that are being answered
        self._thread = ThreadPoolExecutor(1, "prompts")  # tokenizers and templates are used by one at a time
        self._embedding = ThreadPoolExecutor(1, "embeddings")

    @cached_property
    def dialect(self) -> Dialect | None:
        """In which the model calls tools."""
        return dialect_of(self.template)

    @property
    def models(self) -> dict[str, str | None]:
        """The adapter of every name that `model` may have."""
        return {self.settings.name: None} | {name: name for name in self.engine.adapters}

    def adapter(self, model: str) -> str | None:
        """Of a model's name; raises `Refusal` for one that is not there."""
        if model not in self.models:
            there = ", ".join(self.models)
            raise Refusal(404, f"The model '{model[:100]}' does not exist; there are: {there}.", "model", "model_not_found")
        return self.models[model]

    async def prepare(self, work: Callable[[], T]) -> T:
        """Do what takes time outside of the loop: rendering, tokenising, grammars."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, _spoken, work)

    async def embed(self, prompts: list[list[int]]) -> Any:
        """As the engine does."""
        return await asyncio.get_running_loop().run_in_executor(self._embedding, _spoken, lambda: self.engine.embed(prompts))

    def options(self, asked: Drawing, num_prompt: int, most_tokens: int | None) -> GenerationOptions:
        """How an answer is drawn: by the run's keys, where the request does not say; raises `Refusal` where it does not fit."""
        room = self.engine.longest - num_prompt
        if room < 1:
            raise bad(
                f"This model takes {self.engine.longest:,} tokens, prompt and answer together; the prompt has {num_prompt:,}.",
                "prompt" if isinstance(asked, CompletionRequest) else "messages",
                "context_length_exceeded",
            )
        if most_tokens is not None and most_tokens > room:
            raise bad(
                f"This model takes {self.engine.longest:,} tokens; the prompt has {num_prompt:,}, and {most_tokens:,} were asked for.",
                "max_tokens",
                "context_length_exceeded",
            )
        own = self.settings.generation
        names = ("temperature", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty")
        changed: dict[str, Any] = {name: value for name in names if (value := getattr(asked, name)) is not None}
        changed["max_new_tokens"] = min(most_tokens or own.max_new_tokens, room)
        if asked.top_p:
            changed["top_p"] = asked.top_p
        if asked.do_sample is not None:
            changed["do_sample"] = asked.do_sample
        elif asked.temperature is not None:
            changed["do_sample"] = asked.temperature > 0
        if asked.top_p == 0:
            changed["do_sample"] = False
        return own.model_copy(update=changed)

    def look_at_size(self, num_letters: int, param: str) -> None:
        """Raise `Refusal` for a text that is too long even if all of its tokens are the longest: it need not be tokenised."""
        if num_letters > self.engine.longest * self._longest_token:
            said = f"This model takes {self.engine.longest:,} tokens, prompt and answer together; a text has {num_letters:,} letters."
            raise bad(said, param, "context_length_exceeded")

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def bytes_of(self) -> Callable[[int], bytes]:
        """The bytes of a token's text."""
        if not self.tokenizer.is_fast:
            return lambda id: str(self.tokenizer.decode([id])).encode()
        return lambda id: self.grammars.tokens.decode_bytes([id])

    @cached_property
    def ends(self) -> list[str]:
        """The words of tokens that end an answer."""
        return [str(word) for word in self.tokenizer.convert_ids_to_tokens(sorted(self.template.stop_ids))]

    @cached_property
    def clean(self) -> Callable[[str], str]:
        """Takes special tokens out of a text, unless the run keeps them."""
        words = self.template.spelled.every.pattern
        return (lambda text: words.sub("", text)) if self.settings.generation.skip_special_tokens else str

    def close(self) -> None:
        """No more work is taken."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._embedding.shutdown(wait=False, cancel_futures=True)


def _spoken(work: Callable[[], T]) -> T:
    """What the user's run could mend is what the client's request can mend."""
    try:
        return work()
    except UserError as error:
        raise bad("; ".join(error.complaints)) from None


def settings_of(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings that variables say; raises `UserError` with all that are no numbers."""
    found: dict[str, Any] = {}
    faults = []
    for variable, (name, kind) in NUMBERS.items():
        if not (text := environment.get(variable, "").strip()):
            continue
        try:
            found[name] = kind(text)
        except ValueError:
            found[name] = 0
        if not found[name] > 0:
            faults.append(f"{variable} should be a number above 0, found {text!r}")
    UserError.raise_any(faults)
    for variable, name in (("FINERY_CORS_ORIGINS", "origins"), ("FINERY_API_HOSTS", "hosts")):
        if words := tuple(word.strip() for word in environment.get(variable, "").split(",") if word.strip()):
            found[name] = words
    if "*" in found.get("hosts", ()):
        found["hosts"] = None
    return found


NUMBERS: dict[str, tuple[str, type]] = {
    "MAX_CONCURRENT": ("max_concurrent", int),
    "FINERY_API_QUEUE": ("most_answers", int),
    "FINERY_API_SECONDS": ("most_seconds", float),
    "FINERY_API_BYTES": ("most_bytes", int),
    "FINERY_API_DRAIN": ("drain_seconds", float),
}
"""Variables of the environment, and what they set."""
