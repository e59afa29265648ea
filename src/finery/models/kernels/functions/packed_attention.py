"""Attention over rows that lie end to end: each sees itself alone, no mask of all with all is made.

Shapes: T tokens of all rows, H heads, K heads of keys and values, G = H / K, D a head's width, n tokens of one row, b of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finery.compat import takes_varlen, varlen_attention
from finery.models.kernels import native

MOST_SCORES = 8 * 2**20
"""Scores of one block: H · b · keys."""
MOST_QUERIES = 256
"""Queries of one block: keys after the last of them are not looked at, which saves up to half of a long row's work."""


class CausalRows(torch.autograd.Function):
    """softmax(s·Q·Kᵀ)·V for rows from `ends[i - 1]` to `ends[i]`, each query seeing itself and at most `window` - 1 tokens before it.

    Plain matrix products, with the softmax done in place. Saved are the inputs, the output and one number for each query and head; the
    scores are computed again in the backward pass (Dao et al., 2022, arXiv 2205.14135, in blocks of rows of queries).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ends: Sequence[int], scale: float, window: int) -> Tensor:
        """(1, T, H, D)"""
        q, k, v = _grouped(query, key), key[0], value[0]  # (K, T, G, D), (K, T, D)
        out = torch.empty(q.shape[1], q.shape[0], *q.shape[2:], dtype=q.dtype)  # (T, K, G, D), as the next layer reads it
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        for first, last, low in _blocks(ends, q.shape[0] * q.shape[2], window):
            p = _scores(q, k, first, last, low)
            _softmax(p, lse, (first, last, low), window, scale, known=False)
            o = torch.bmm(p, v[:, low:last])
            out[first:last].copy_(o.view(len(k), last - first, -1, o.shape[-1]).transpose(0, 1))
        ctx.save_for_backward(q, key, value, out, lse)
        ctx.ends, ctx.scale, ctx.window = ends, scale, window
        return out.view(1, out.shape[0], -1, out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The scores once more, then the gradients of queries, keys and values."""
        q, key, value, out, lse = ctx.saved_tensors
        k, v = key[0], value[0]
        dout = gradients[0].to(q.dtype).view(out.shape)
        delta = (dout.float() * out.float()).sum(-1).transpose(0, 1).contiguous()  # (K, T, G)
        dout = dout.transpose(0, 1).contiguous()  # (K, T, G, D)
        dq = torch.empty_like(q)
        # several blocks may add to a key: in fp32, unless every row is one block
        blocks = list(_blocks(ctx.ends, q.shape[0] * q.shape[2], ctx.window))
        whole = len(blocks) == len(ctx.ends)
        dk, dv = (torch.zeros(part.shape, dtype=q.dtype if whole else torch.float32) for part in (k, v))
        for first, last, low in blocks:
            p = _scores(q, k, first, last, low)
            _softmax(p, lse, (first, last, low), ctx.window, ctx.scale, known=True)
            do = dout[:, first:last].reshape(len(k), -1, dout.shape[-1])
            dp = torch.bmm(do, v[:, low:last].transpose(1, 2))
            _add(dv[:, low:last], torch.bmm(p.transpose(1, 2), do), whole)
            rows = p.shape[1]
            native.call("softmax_backward", p, dp, delta[:, first], delta.stride(0), len(k), rows, p.shape[2], float(ctx.scale))
            dq[:, first:last].copy_(torch.bmm(dp, k[:, low:last]).view(len(k), last - first, *q.shape[2:]))
            _add(dk[:, low:last], torch.bmm(dp.transpose(1, 2), q[:, first:last].reshape(len(k), -1, q.shape[-1])), whole)
        dquery = dq.permute(0, 2, 1, 3).reshape(1, -1, *dq.shape[1::2])
        return dquery, dk.to(key.dtype)[None], dv.to(value.dtype)[None], None, None, None


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """(1, H, T, D) → (K, T, G, D): the heads that share keys beside each other, so that keys need no copies."""
    _, _, tokens, dim = query.shape
    return query.view(key.shape[1], -1, tokens, dim).transpose(1, 2).contiguous()


def _blocks(ends: Sequence[int], heads: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Queries `first` to `last`, and the first key that any of them sees."""
    start = 0
    for end in ends:
        size = min(max(MOST_SCORES // (heads * min(end - start, window + MOST_QUERIES)), 64), MOST_QUERIES)
        for first in range(start, end, size):
            yield first, min(first + size, end), max(start, first - window + 1)
        start = end


def _scores(q: Tensor, k: Tensor, first: int, last: int, low: int) -> Tensor:
    """(K, b · G, keys)"""
    return torch.bmm(q[:, first:last].reshape(len(k), -1, q.shape[-1]), k[:, low:last].transpose(1, 2))


def _softmax(p: Tensor, lse: Tensor, block: tuple[int, int, int], window: int, scale: float, known: bool) -> None:
    first, last, low = block
    places = (lse.stride(0), len(p), last - first, lse.shape[2], last - low, first, low, window)
    native.call("causal_softmax", p, lse[:, first], *places, float(scale), known)


def _add(sum_: Tensor, part: Tensor, is_all: bool) -> None:
    if is_all:
        sum_.copy_(part)
    else:
        sum_.add_(part)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **how: Any) -> tuple[Tensor, None]:
    """What transformers calls: queries (B, H, T, D), keys and values (B, K, T, D) to (B, T, H, D).

    `cu_seq_lens_q` holds where rows begin, and the end; without it each of the B rows is one, padded on the right at most, so that
    causality keeps padding out.
    """
    asked = Asked.read(query, how)
    alike = query.dtype == key.dtype == value.dtype and value.shape[-1] == query.shape[-1]
    if alike and asked.is_plain and native.serves(query):
        ends = asked.ends(query)
        rows = [
            CausalRows.apply(q[None], k[None], v[None], ends, asked.scale, asked.window) for q, k, v in zip(query, key, value, strict=True)
        ]
        return torch.cat(rows) if len(rows) > 1 else rows[0], None  # type: ignore[return-value]
    if alike and asked.is_plain and asked.starts is not None and takes_varlen(query):
        return varlen_attention(query, key, value, asked.starts, asked.longest, asked.scale, asked.window), None
    return attend_by_sdpa(module, query, key, value, *mask, **how)


def attend_by_sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **how: Any) -> tuple[Tensor, None]:
    """The same, row by row through torch's SDPA, or by plain operations where scores are capped."""
    asked = Asked.read(query, how)
    rows = [_by_torch(q, k, v, asked.ends(query), asked) for q, k, v in zip(query, key, value, strict=True)]
    return torch.cat(rows) if len(rows) > 1 else rows[0], None


@dataclass(frozen=True)
class Asked:
    """What transformers asks of an attention function, beside the tensors."""

    scale: float
    window: int
    softcap: float
    dropout: float
    starts: Tensor | None
    longest: int

    @classmethod
    def read(cls, query: Tensor, how: dict[str, Any]) -> Asked:
        """From the arguments of transformers' interface; raises `ValueError` for what no kernel here serves."""
        if how.get("s_aux") is not None or how.get("position_bias") is not None or how.get("is_causal") is False:
            raise ValueError("attention sinks, position biases and views into the future are not served")
        tokens, scale = query.shape[2], how.get("scaling")
        return cls(
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window=min(how.get("sliding_window") or tokens, tokens),
            softcap=how.get("softcap") or 0.0,
            dropout=how.get("dropout") or 0.0,
            starts=how.get("cu_seq_lens_q"),
            longest=how.get("max_length_q") or tokens,
        )

    @property
    def is_plain(self) -> bool:
        """Neither dropout nor a cap of scores."""
        return not self.dropout and not self.softcap

    def ends(self, query: Tensor) -> list[int]:
        """Where rows end."""
        return self.starts.tolist()[1:] if self.starts is not None else [query.shape[2]]


def _by_torch(query: Tensor, key: Tensor, value: Tensor, ends: Sequence[int], asked: Asked) -> Tensor:
    """(H, T, D) to (1, T, H, D)"""
    groups = len(query) // len(key)
    outputs, start = [], 0
    for end in ends:
        q, k, v = query[:, start:end], key[:, start:end].repeat_interleave(groups, 0), value[:, start:end].repeat_interleave(groups, 0)
        places = torch.arange(end - start, device=q.device)
        far = places[:, None] - places[None]
        seen = (far >= 0) & (far < asked.window)
        if asked.softcap:
            scores = asked.softcap * torch.tanh((q @ k.transpose(1, 2)) * asked.scale / asked.softcap)
            p = torch.softmax(scores.float().masked_fill(~seen, float("-inf")), -1).to(q.dtype)
            outputs.append(torch.dropout(p, asked.dropout, asked.dropout > 0) @ v)
        else:
            whole = asked.window >= end - start
            how = {"attn_mask": None if whole else seen, "is_causal": whole, "dropout_p": asked.dropout, "scale": asked.scale}
            outputs.append(torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], **how)[0])
        start = end
    return torch.cat(outputs, 1).transpose(0, 1)[None]
