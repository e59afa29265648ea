"""Tokens of answers in OpenAI's shapes: their texts, their bytes and their chances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from finery.engines.base import Token

_LEAST = -9999.0  # what OpenAI writes for minus infinity

BytesOf = Callable[[int], bytes]
"""The bytes of a token's text."""


def chat_logprobs(tokens: Iterable[Token], bytes_of: BytesOf) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat."""
    found = []
    for token in tokens:
        own = _entry(token.id, token.logprob, bytes_of)
        found.append(own | {"top_logprobs": [_entry(id, logprob, bytes_of) for id, logprob in token.likeliest]})
    return found


def _entry(id: int, logprob: float | None, bytes_of: BytesOf) -> dict[str, Any]:
    raw = bytes_of(id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def completion_logprobs(tokens: Sequence[Token], bytes_of: BytesOf, offset: int, tops: bool) -> tuple[dict[str, Any], int]:
    """`logprobs` of a completion, and where the next token's text begins."""
    texts, offsets = [], []
    for token in tokens:
        texts.append(bytes_of(token.id).decode("utf-8", "replace"))
        offsets.append(offset)
        offset += len(texts[-1])
    likeliest = [{bytes_of(id).decode("utf-8", "replace"): _finite(value) for id, value in token.likeliest} for token in tokens]
    told = {"tokens": texts, "token_logprobs": [_finite(token.logprob) for token in tokens], "text_offset": offsets}
    return told | {"top_logprobs": likeliest if tops else None}, offset


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(float(logprob), _LEAST)


def within(tokens: Sequence[Token], text: str, stops: bool, stop_ids: frozenset[int], bytes_of: BytesOf) -> int:
    """How many tokens make up an answer that has ended: not the stop token, nor, where there were any, those of a stop text."""
    size, wanted = len(tokens), len(text.encode())
    if size and tokens[-1].id in stop_ids:
        return size - 1
    total = sum(len(bytes_of(token.id)) for token in tokens)
    while stops and size and total - len(bytes_of(tokens[size - 1].id)) >= wanted:
        size -= 1
        total -= len(bytes_of(tokens[size].id))
    return size
