"""RMSNorm in one pass forward and one backward, saving its input and one number a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finery.models.kernels import native
from finery.models.kernels.base import compute_dtype, is_close, untouched

MIXED = "_mixed"
"""Of the functions in norms.h: those from fp32 to bf16."""


class Normalise(torch.autograd.Function):
    """y = x / rms(x) · (w + shift) (Zhang & Sennrich, 2019, arXiv 1910.07467), in the format of x, or in that of autocast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: float, eps: float) -> Tensor:
        """y, with x and 1 / rms of each row kept."""
        x = x.contiguous()
        scale = weight.detach().float() + shift
        # products that read it would round it as well, each once more
        mixed = x.dtype == torch.float32 and compute_dtype(x, x) == torch.bfloat16
        y = torch.empty_like(x, dtype=torch.bfloat16 if mixed else x.dtype)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
        native.call(f"rms_norm_forward{MIXED * mixed}", x, scale, y, rstd, rstd.numel(), x.shape[-1], float(eps))
        ctx.save_for_backward(x, weight, rstd)
        ctx.shift = shift
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """dx, and dw where the weight is trained."""
        x, weight, rstd = ctx.saved_tensors
        mixed = x.dtype == torch.float32 and gradients[0].dtype == torch.bfloat16
        dy = gradients[0].to(torch.bfloat16 if mixed else x.dtype).contiguous()
        dx = torch.empty_like(x)
        # a row for each thread, which sums its own part
        parts = torch.zeros(torch.get_num_threads(), x.shape[-1]) if ctx.needs_input_grad[1] else None
        more = (weight.float() + ctx.shift, rstd, dx, parts, rstd.numel(), x.shape[-1])
        native.call(f"rms_norm_backward{MIXED * mixed}", x, dy, *more)
        return dx, parts.sum(0).to(weight.dtype) if parts is not None else None, None, None


def candidates(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Modules with one vector and a small number, and what computes the same."""
    for norm in model.modules():
        eps = next((value for name in ("variance_epsilon", "eps") if isinstance(value := norm.__dict__.get(name), float)), None)
        weights = list(norm.parameters(recurse=False))
        if eps is None or len(weights) != 1 or weights[0].ndim != 1 or list(norm.children()) or not untouched(norm):
            continue
        for shift in (0.0, 1.0):
            forward = partial(_normalise, norm, shift, eps)
            if _same(norm, forward, weights[0]):
                yield norm, forward
                break


def _normalise(norm: Any, shift: float, eps: float, hidden: Tensor) -> Tensor:
    return Normalise.apply(hidden, norm.weight, shift, eps)  # type: ignore[return-value]


def _same(norm: nn.Module, forward: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    """On rows of usual size and on ones so small that eps counts."""
    dice = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, weight.numel(), generator=dice) * torch.tensor([1.0, 1e-3]).view(2, 1, 1)
    with torch.no_grad():
        try:
            plain = norm(rows.to(weight.dtype))
        except (TypeError, RuntimeError, ValueError):  # it is called otherwise, so it is something else
            return False
        ours = forward(rows.to(weight.dtype))
    return isinstance(plain, Tensor) and plain.shape == ours.shape and all(map(is_close, ours, plain))
