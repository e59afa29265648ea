"""What a model says to the probes, and how far apart two models are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finery.parity.probes import Probe

NUM_WRITTEN = 24
"""Tokens of an answer that are compared."""
NUM_PLACES = 48
"""The last places of a prompt that are compared."""


@dataclass(frozen=True)
class Answers:
    """Next-token logits (T, V) in fp32 for the last places of every probe, and the tokens that were written to those that are answered."""

    logits: list[Tensor]
    written: list[list[int]]


@torch.no_grad()
def answers(model: Any, probes: Sequence[Probe], stop_ids: Sequence[int], writes: bool = True) -> Answers:
    """What `model` says; probes with tokens that it has no row for get no logits. Without `writes`, no answers are written."""
    model.eval()
    known = int(model.get_input_embeddings().weight.shape[0])
    logits, written = [], []
    for probe in probes:
        ids = torch.tensor([probe.ids], device=model.device)
        fits = bool(probe.ids) and max(probe.ids) < known
        logits.append(model(input_ids=ids, use_cache=False).logits[0, -NUM_PLACES:].float().cpu() if fits else torch.zeros(0, 0))
        if writes and probe.answered:
            written.append(_written(model, ids, stop_ids) if fits else [])
    return Answers(logits, written)


def _written(model: Any, ids: Tensor, stop_ids: Sequence[int]) -> list[int]:
    """The likeliest tokens, one after the other; the model's own settings of sampling do not count."""
    found: list[int] = []
    past = None
    for _ in range(NUM_WRITTEN):
        said = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = said.past_key_values
        found.append(int(said.logits[0, -1].argmax()))
        if found[-1] in stop_ids:
            break
        ids = ids.new_tensor([[found[-1]]])
    return found


@dataclass(frozen=True)
class Distance:
    """How far one model is from another over all places of the probes."""

    mean_kl: float  # nats; KL(first ‖ second) of the next token
    max_kl: float
    mean_delta: float  # of logits
    max_delta: float
    same_next: float  # share of places with the same likeliest token
    num_places: int


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Distance | None:
    """Between logits of the same probes, over the tokens that both have. Nothing where one has no logits, or not finite ones."""
    parts = list(_parts(first, second))
    if len(parts) < len(first):
        return None
    kl, delta, same = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return Distance(float(kl.mean()), float(kl.max()), float(delta.mean()), float(delta.max()), float(same.float().mean()), len(kl))


def _parts(first: Sequence[Tensor], second: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For every probe: KL at each place, all differences of logits, and whether the likeliest token is the same at each place."""
    for one, other in zip(first, second, strict=True):
        width = min(one.shape[-1], other.shape[-1])
        if one.shape[0] != other.shape[0] or not width or not (one.isfinite().all() and other.isfinite().all()):
            continue
        a, b = one[:, :width], other[:, :width]
        kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1).clamp(min=0)
        yield kl, (a - b).abs().flatten(), a.argmax(-1) == b.argmax(-1)


def effect(base: Sequence[Tensor], trained: Sequence[Tensor], other: Sequence[Tensor]) -> float | None:
    """How much of what training has changed is in `other`: 1 all, 0 nothing, 2 twice; nothing where too little has changed to tell.

    The coefficient of (other - base) on (trained - base), by least squares over the logits of all places, each place's about their mean.
    Rounding is as likely to go one way as the other and hardly moves it.
    """
    along = length = size = 0.0
    for one, two, three in zip(base, trained, other, strict=True):
        width = min(one.shape[-1], two.shape[-1], three.shape[-1])
        if not width or not one.shape[0] == two.shape[0] == three.shape[0]:
            return None
        start = one[:, :width]
        change, found = (_centred(logits[:, :width] - start) for logits in (two, three))
        along += float((change * found).sum())
        length += float((change * change).sum())
        size += float(_centred(start).square().sum())
    return along / length if length > _LEAST_CHANGE * size else None


_LEAST_CHANGE = 1e-8


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)
