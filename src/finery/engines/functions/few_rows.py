"""Products of few rows on a CPU: torch's take longer with each row, though the weights that have to be read are the same.

Shapes: M rows, K numbers in, N out.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from finery.models.kernels import native

MOST_ROWS = 32
"""With more rows torch's products are as fast."""
LANES = 16
"""K must be a multiple of so many; see native/few_rows.h."""


def serve_few_rows(model: nn.Module) -> int:
    """Let plain linear layers use the function where it serves and gives the same; returns how many do.

    Weights in fp32 that bf16 holds without loss, as those of most models are, are kept in both: half the bytes are read for a token.
    """
    count = 0
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__ and _fits(module):
            weight = module.weight.detach()
            narrow = weight.bfloat16()
            module.forward = partial(_forward, module, narrow if torch.equal(narrow.to(weight.dtype), weight) else weight)
            count += 1
    return count


def _fits(module: nn.Linear) -> bool:
    weight = module.weight
    return native.serves(weight) and weight.is_contiguous() and module.in_features % LANES == 0 and is_right(weight.dtype)


def _forward(module: nn.Linear, weight_NK: Tensor, input: Tensor) -> Tensor:
    if input.numel() // input.shape[-1] > MOST_ROWS or torch.is_grad_enabled():
        return nn.functional.linear(input, module.weight, module.bias)
    return few_rows(input, weight_NK, module.bias)


def few_rows(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` for few rows, sums in fp32, in the format of `x`; the same for a row whatever the others are."""
    flat_MK = x.reshape(-1, x.shape[-1]).float().contiguous()
    size = len(weight_NK)
    y_MN = torch.empty(len(flat_MK), size)
    bias = bias_N.detach().float().contiguous() if bias_N is not None else None
    native.call("few_rows", weight_NK.detach(), flat_MK, bias, y_MN, len(flat_MK), size, flat_MK.shape[-1])
    return y_MN.to(x.dtype).reshape(*x.shape[:-1], size)


@cache
def is_right(dtype: torch.dtype) -> bool:
    """Whether what the compiler made of it gives what torch gives, and the same for a row alone and among others."""
    dice = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(37, 3 * LANES, generator=dice).to(dtype)
    x_MK, bias_N = torch.randn(15, 3 * LANES, generator=dice), torch.randn(37, generator=dice)
    if not native.serves(weight_NK):
        return False
    found: Any = few_rows(x_MK, weight_NK, bias_N)
    wanted = nn.functional.linear(x_MK, weight_NK.float(), bias_N)
    alone = torch.cat([few_rows(x_MK[row : row + 1], weight_NK, bias_N) for row in range(len(x_MK))])
    return torch.equal(found, alone) and float((found - wanted).abs().max()) < 1e-4
