"""Weights as native/decoder.h takes them.

Shapes: N numbers out, K numbers in.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from finery.models.kernels import native

SLAB_BYTES = 64 << 20
Linear = tuple[Tensor, Tensor | None]
"""Weights (N, K), and biases where there are some."""


class Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("outer", ctypes.c_int64), ("inner", ctypes.c_int64), ("is_bf16", ctypes.c_int64),
    )  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = (
        ("norm_attention", ctypes.c_void_p), ("norm_attended", ctypes.c_void_p), ("norm_mlp", ctypes.c_void_p),
        ("norm_mlp_done", ctypes.c_void_p), ("norm_query", ctypes.c_void_p), ("norm_key", ctypes.c_void_p),
        ("in_", Matrix), ("out", Matrix), ("gated", Matrix), ("down", Matrix), ("window", ctypes.c_int64), ("rotation", ctypes.c_int64),
    )  # fmt: skip


class Decoder(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64), ("heads", ctypes.c_int64), ("kv_heads", ctypes.c_int64), ("width", ctypes.c_int64),
        ("rotary", ctypes.c_int64), ("num_layers", ctypes.c_int64), ("is_gelu", ctypes.c_int64),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float), ("cap", ctypes.c_float),
        ("layers", ctypes.POINTER(Layer)), ("norm", ctypes.c_void_p), ("head", Matrix),
    )  # fmt: skip


class Weights:
    """Copies of a model's weights, in panels; as bf16 where it holds them without loss, so that half the bytes are read for a token."""

    def __init__(self) -> None:
        self.panel: int = native.function("panel_width")()
        self._kept: list[Tensor] = []  # what the structures point to
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def vector(self, values: Tensor, added: float = 0.0) -> int:
        """The address of a copy."""
        self._kept.append(values.detach().float().clone().add_(added))
        return self._kept[-1].data_ptr()

    def matrix(self, parts: Sequence[Linear], in_turn: bool = False) -> Matrix:
        """Products of the same input joined: one after the other, or (`in_turn`) a panel of each in turn."""
        groups = [[part] for part in parts] if in_turn else [parts]
        held = [group[0][0].detach() if len(group) == 1 else torch.cat([weight.detach() for weight, _ in group]) for group in groups]
        halves = [one.bfloat16() for one in held]
        narrow = all(torch.equal(half.to(one.dtype), one) for half, one in zip(halves, held, strict=True))
        outer, inner = held[0].shape
        apart = len(held) * inner * self.panel
        panels = self._room(-(-outer // self.panel) * apart, torch.bfloat16 if narrow else torch.float32)
        for number, one in enumerate(halves if narrow else held):
            native.call("pack", one.contiguous(), panels[number * inner * self.panel :], outer, inner, apart)
        biased = any(bias is not None for _, bias in parts)
        biases = [bias if bias is not None else torch.zeros(len(weight)) for weight, bias in parts]
        return Matrix(panels.data_ptr(), self.vector(torch.cat(biases)) if biased else None, outer, inner, narrow)

    def _room(self, size: int, dtype: torch.dtype) -> Tensor:
        size_bytes = size * dtype.itemsize
        if self._used + size_bytes > len(self._slab):
            self._slab, self._used = _slab(max(size_bytes, SLAB_BYTES)), 0
            self._kept.append(self._slab)
        begin, self._used = self._used, self._used + -(-size_bytes // 64) * 64
        return self._slab[begin : begin + size_bytes].view(dtype)


def _slab(size: int) -> Tensor:
    """In large pages where the system has them: memory is read a third faster."""
    if os.name != "posix":
        return torch.empty(size, dtype=torch.uint8)
    room: Any = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without them
            room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)
