"""POST /v1/completions and /v1/embeddings: plain texts, without a chat template."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from finery.engines.base import Ask, Token
from finery.serve.chats import usage
from finery.serve.desk import Answers
from finery.serve.protocol import CompletionRequest, EmbeddingRequest
from finery.serve.refusals import bad
from finery.serve.service import Service
from finery.serve.tokens import completion_logprobs, within

_MOST_INPUTS = 2048


def prompts_of(service: Service, given: str | list[Any], param: str) -> list[list[int]]:
    """Token ids of one text or several, or of ids; raises `Refusal`. Not for the loop's thread."""
    texts: Sequence[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not texts or len(texts) > _MOST_INPUTS:
        raise bad(f"'{param}' must hold 1 to {_MOST_INPUTS:,} texts.", param)
    size = len(service.tokenizer)
    for text in texts:
        service.look_at_size(len(text) if isinstance(text, str) else 0, param)
    found = [_framed(service, text) if isinstance(text, str) else list(text) for text in texts]
    for ids in found:
        if not ids:
            raise bad(f"'{param}' must not be empty.", param)
        if not all(0 <= id < size for id in ids):
            raise bad(f"Token ids must be below {size:,}.", param)
    return found


def _framed(service: Service, text: str) -> list[int]:
    """A text as a model reads it: with what its tokenizer puts before texts, and open at its end."""
    ids = list(service.tokenizer(text)["input_ids"])  # type: ignore[arg-type]
    bare = list(service.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    end = service.tokenizer.eos_token_id
    return ids[:-1] if len(ids) > len(bare) and ids[-1] == end and bare[-1:] != [end] else ids


def prepare(service: Service, asked: CompletionRequest) -> list[Ask]:
    """The answers that are wanted, `n` for each prompt; raises `Refusal`. Not for the loop's thread."""
    adapter = service.adapter(asked.model)
    asks = []
    for prompt in prompts_of(service, asked.prompt, "prompt"):
        options = service.options(asked, len(prompt), asked.max_tokens)
        for number in range(asked.n or 1):
            seed = None if asked.seed is None else asked.seed + number
            asks.append(Ask(prompt, options, asked.stops, seed, asked.logprobs, None, adapter))
    return asks


@dataclass
class Text:
    """What has come of one answer."""

    echo: str = ""
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    num_told: int = 0
    offset: int = 0
    finish: str | None = None

    def logprobs(self, service: Service, asked: CompletionRequest) -> dict[str, Any] | None:
        """Those of tokens that were not told yet, where they are wanted."""
        if asked.logprobs is None:
            return None
        end = len(self.tokens)
        if self.finish is not None:
            end = max(within(self.tokens, self.text, bool(asked.stops), service.template.stop_ids, service.bytes_of), self.num_told)
        told, self.offset = completion_logprobs(self.tokens[self.num_told : end], service.bytes_of, self.offset, asked.logprobs > 0)
        self.num_told = end
        return told


def _begun(service: Service, asked: CompletionRequest, asks: Sequence[Ask]) -> list[Text]:
    if not asked.echo:
        return [Text() for _ in asks]
    given = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
    texts = given if isinstance(given[0], str) else []
    number = asked.n or 1
    return [Text(str(texts[at // number]) if texts else str(service.tokenizer.decode(list(ask.prompt_ids)))) for at, ask in enumerate(asks)]


def _usage(asks: Sequence[Ask], answers: Answers) -> dict[str, int]:
    prompts = {id(ask.prompt_ids): len(ask.prompt_ids) for ask in asks}
    return usage(sum(prompts.values()), answers.num_tokens)


async def whole(service: Service, asked: CompletionRequest, asks: list[Ask], answers: Answers) -> dict[str, Any]:
    """The response that is not streamed."""
    texts = _begun(service, asked, asks)
    async with answers:
        async for index, piece in answers:
            texts[index].text += piece.text
            texts[index].tokens += piece.tokens
            texts[index].finish = piece.finish
    choices = [
        {"index": index, "text": text.echo + text.text, "logprobs": text.logprobs(service, asked), "finish_reason": text.finish}
        for index, text in enumerate(texts)
    ]
    head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": asked.model}
    return {**head, "choices": choices, "usage": _usage(asks, answers)}


async def chunks(service: Service, asked: CompletionRequest, asks: list[Ask], answers: Answers) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream."""
    texts = _begun(service, asked, asks)
    head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": asked.model}
    more = {"usage": None} if asked.tells_usage else {}
    async with answers:
        async for index, piece in answers:
            text = texts[index]
            told, text.echo = text.echo + piece.text, ""
            text.text += piece.text
            text.tokens += piece.tokens
            text.finish = piece.finish
            if told or piece.finish is not None:
                logprobs = text.logprobs(service, asked)
                choice = {"index": index, "text": told, "logprobs": logprobs, "finish_reason": piece.finish}
                yield {**head, "choices": [choice], **more}
    if asked.tells_usage:
        yield {**head, "choices": [], "usage": _usage(asks, answers)}


async def embeddings(service: Service, asked: EmbeddingRequest) -> dict[str, Any]:
    """The mean of the last hidden states of each text's tokens."""
    if service.adapter(asked.model) is not None:
        raise bad("Embeddings are those of the first model that /v1/models lists.", "model")
    prompts = await service.prepare(lambda: prompts_of(service, asked.input, "input"))
    for prompt in prompts:
        if len(prompt) > service.engine.longest:
            text = f"This model takes {service.engine.longest:,} tokens; a text has {len(prompt):,}."
            raise bad(text, "input", "context_length_exceeded")
    vectors = await service.embed(prompts)
    coded = asked.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": at,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if coded else [float(value) for value in vector],
        }
        for at, vector in enumerate(vectors)
    ]
    used = sum(map(len, prompts))
    service.metrics.prompt_tokens += used
    return {"object": "list", "data": data, "model": asked.model, "usage": {"prompt_tokens": used, "total_tokens": used}}
