"""The product of a gated MLP, activation included, in one pass forward and one backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finery.models.kernels import native
from finery.models.kernels.base import in_mode, is_close, untouched

SILU, GELU_TANH = 0, 1
"""How bodies.h calls the activations."""


class Gate(torch.autograd.Function):
    """y = act(gate) · up, elementwise (Shazeer, 2020, arXiv 2002.05202); the activation is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: int) -> Tensor:
        """y, with gate and up kept."""
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        native.call("gated_forward", gate, up, y, gate.numel(), _kind(kind))
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d gate and d up."""
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        native.call("gated_backward", gradients[0].to(gate.dtype).contiguous(), gate, up, dgate, dup, gate.numel(), _kind(ctx.kind))
        return dgate, dup, None


def _kind(kind: int) -> bool:
    """An enumeration goes as C's int, which `native.call` makes of truth values."""
    return bool(kind)


def _compute(mlp: Any, kind: int, hidden: Tensor) -> Tensor:
    return mlp.down_proj(Gate.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden), kind))


def candidates(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Gated MLPs, and what computes the same."""
    for mlp in model.modules():
        if {"gate_proj", "up_proj", "down_proj"} <= dict(mlp.named_children()).keys() and untouched(mlp):
            kind = next((kind for kind in (SILU, GELU_TANH) if _same(mlp, kind)), None)
            if kind is not None:
                yield mlp, partial(_compute, mlp, kind)


def _same(mlp: Any, kind: int) -> bool:
    weight = next(mlp.gate_proj.parameters())
    rows = torch.randn(1, 5, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        with in_mode(mlp, training=False), torch.no_grad():  # an adapter's dropout would differ from call to call
            return is_close(_compute(mlp, kind, rows), mlp(rows))
    except (TypeError, RuntimeError, ValueError):  # it computes something else
        return False
