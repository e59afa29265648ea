"""Trained linear layers in mixed precision, with copies of their weights in half precision that are made once a step.

Shapes: T tokens, I inputs, O outputs. y = x·Wᵀ + b, dx = dy·W, dW = dyᵀ·x; products in half precision, W and its gradient in fp32
(Micikevicius et al., 2017, arXiv 1710.03740).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finery.models.kernels.base import compute_dtype, untouched


class Copies:
    """Weights in another format, each rounded once until `clear`; safe to be asked by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[tuple[int, torch.dtype], tuple[int, int, Tensor]] = {}

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`, without its history."""
        if weight.dtype == dtype:
            return weight.detach()
        with self._lock:
            state = (weight.data_ptr(), weight._version)
            known = self._made.get((id(weight), dtype))
            if known is None or known[:2] != state:
                self._made[id(weight), dtype] = known = (*state, weight.detach().to(dtype))
            return known[2]

    def clear(self) -> None:
        """Weights are about to change, by whatever way."""
        with self._lock:
            self._made.clear()


COPIES = Copies()
"""Those of this process."""


class Mixed(torch.autograd.Function):
    """One layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """y; kept are x in half precision and W, whose copy is there anyway."""
        half = x.to(dtype)
        ctx.save_for_backward(half, weight)
        ctx.formats = x.dtype, bias.dtype if bias is not None else None
        return torch.nn.functional.linear(half, COPIES.of(weight, dtype), bias.to(dtype) if bias is not None else None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """dx, dW and db, each where it is asked for."""
        x, weight = ctx.saved_tensors
        dy = gradients[0].to(x.dtype)
        flat = dy.reshape(-1, dy.shape[-1])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dx = (dy @ COPIES.of(weight, x.dtype)).to(ctx.formats[0]) if wants_x else None
        dweight = (flat.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if wants_weight else None
        dbias = flat.float().sum(0).to(ctx.formats[1]) if wants_bias else None
        return dx, dweight, dbias, None


def _compute(layer: nn.Linear, x: Tensor) -> Tensor:
    dtype = compute_dtype(x, layer.weight)
    if dtype == layer.weight.dtype:
        return nn.Linear.forward(layer, x)
    with torch.autocast(x.device.type, enabled=False):  # the formats are settled
        return Mixed.apply(x, layer.weight, layer.bias, dtype)  # type: ignore[return-value]


def candidates(model: Any) -> Iterator[tuple[nn.Linear, Callable[[Tensor], Tensor]]]:
    """Linear layers with trained fp32 weights, but not the output head, and what computes the same."""
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        trained = type(layer) is nn.Linear and layer.weight.requires_grad and layer.weight.dtype == torch.float32
        if trained and layer is not head and ".lora_" not in name and untouched(layer):  # thin ones are served with their layer
            yield layer, partial(_compute, layer)  # type: ignore[arg-type]
