"""New tokens of many rows through a whole model in one native call, for decoders such as Llama's on a CPU.

Shapes: R rows, L layers, T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finery.engines.functions.native_decoder import caps, check_shapes, decoder_of, refusal, rotations
from finery.engines.functions.native_weights import Weights
from finery.engines.functions.rows import RowCache
from finery.log import get_logger
from finery.models.kernels import native

log = get_logger(__name__)

FAR = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far scores may lie from the model's own, as a part of the largest: sums are taken in another order, and all of them in fp32."""

Part = tuple[RowCache, Tensor]
"""A cache and new tokens (R, new) of all its rows."""


class Tokens(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64), ("num_rows", ctypes.c_int64), ("num_asked", ctypes.c_int64), ("longest", ctypes.c_int64),
        ("row", ctypes.c_void_p), ("column", ctypes.c_void_p), ("position", ctypes.c_void_p), ("asked", ctypes.c_void_p),
        ("first", ctypes.c_void_p), ("head_stride", ctypes.c_void_p), ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
        ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("hidden", ctypes.c_void_p), ("scores", ctypes.c_void_p),
    )  # fmt: skip


def find_native_step(model: Any) -> NativeStep | None:
    """The way through this model in one call, where there is one and it gives what the model gives."""
    if reason := refusal(model):
        log.debug("no native step: %s", reason)
        return None
    try:
        step = NativeStep(model)
        if is_right(model, step):
            return step
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        log.debug("no native step: %s", error)
    log.info("the native step of %s does not give what the model gives: it is not used", type(model).__name__)
    return None


class NativeStep:
    """One model's weights, ready for native/decoder.h."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights = Weights()
        _, self.cap = caps(model)
        self._call = native.function("decoder_step")
        self._decoder = decoder_of(model, self.weights)
        check_shapes(self._decoder)
        self._angles: list[Tensor] = []  # (positions, numbers of a head that are rotated): cosines for each rotation, then sines
        self._rotate(1)
        self._decoder.rotary = self._angles[0].shape[1]

    def _rotate(self, positions: int) -> None:
        """Angles of so many places, and more, so that this is seldom called."""
        if self._angles and positions <= len(self._angles[0]):
            return
        places, rotate = torch.arange(2 * positions + 1024)[None], self.model.model.rotary_emb
        pairs = [rotate(torch.empty(0), places, *([name] if name else [])) for name in rotations(self.model)]
        self._angles = [value[0].contiguous() for value in (*(cos for cos, _ in pairs), *(sin for _, sin in pairs))]

    def __call__(self, parts: Sequence[Part]) -> Tensor:
        """Scores (R, V) after the last token of each row, of all parts; the tokens are in the caches then."""
        caches = [cache for cache, _ in parts]
        news = [ids.shape[1] for _, ids in parts]
        for cache, ids in parts:
            cache.reserve(len(ids), ids.shape[1], self._decoder.kv_heads, self._decoder.width)
        lengths = np.concatenate([cache.lengths for cache in caches])
        ends = np.concatenate([[cache.window.end] * len(cache.lengths) for cache in caches])
        new = np.concatenate([[size] * len(cache.lengths) for cache, size in zip(caches, news, strict=True)])
        row = np.repeat(np.arange(len(new)), new)
        beyond = np.arange(len(row)) - np.repeat(new.cumsum() - new, new)  # tokens since the row's first new one
        self._rotate(int((lengths + new).max()))
        hidden = self.model.get_input_embeddings()(torch.cat([ids.flatten() for _, ids in parts])).float().contiguous()
        scores = torch.empty(len(new), self._decoder.head.outer)
        addresses = [cache.addresses() for cache in caches]
        angles = np.array([value.data_ptr() for value in self._angles])
        held: list[NDArray[np.int64] | Tensor] = [
            row, ends[row] + beyond, lengths[row] + beyond, new.cumsum() - 1, ends - lengths,
            np.concatenate([[cache.head_stride] * len(cache.lengths) for cache in caches]),
            np.concatenate([keys for keys, _ in addresses], 1), np.concatenate([values for _, values in addresses], 1),
            angles, angles[len(angles) // 2 :], hidden, scores,
        ]  # fmt: skip
        where = [value.data_ptr() if isinstance(value, Tensor) else value.ctypes.data for value in held]
        tokens = Tokens(len(row), len(new), len(new), int((lengths + new).max()), *where)
        if self._call(ctypes.byref(self._decoder), ctypes.byref(tokens), ctypes.c_int(torch.get_num_threads())):
            raise MemoryError("there is no memory for the next tokens")
        for cache, size in zip(caches, news, strict=True):
            cache.advance(size)
        return scores.div_(self.cap).tanh_().mul_(self.cap) if self.cap else scores


def is_right(model: Any, step: NativeStep) -> bool:
    """Whether it gives what the model gives for a few random tokens, and the same bits for a row alone and among others."""
    dice = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    texts = [torch.randint(0, size, (1, length), generator=dice) for length in (11, 4, 16)]
    with torch.no_grad():
        wanted = torch.cat([model(input_ids=text, use_cache=False, logits_to_keep=1).logits[:, -1] for text in texts])
        found, alone = _trial(step, texts), torch.cat([_trial(step, [text]) for text in texts])
    far = FAR[next(model.parameters()).dtype] * max(float(wanted.abs().max()), 1.0)
    return torch.equal(found, alone) and float((found - wanted).abs().max()) <= far  # NaN is not


def _trial(step: NativeStep, texts: Sequence[Tensor]) -> Tensor:
    """Prompts read together, each with a cache of its own, then a token of every row."""
    own = [RowCache(step.model.config) for _ in texts]
    for cache in own:
        cache.lengths = [0]
    step([(cache, text[:, :-1]) for cache, text in zip(own, texts, strict=True)])
    joined = RowCache(step.model.config)
    for cache in own:
        joined.join(cache)
    return step([(joined, torch.cat([text[:, -1:] for text in texts]))])
