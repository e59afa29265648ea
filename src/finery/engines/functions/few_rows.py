"""Products of few rows on a CPU: torch's take longer with each row, though the weights that have to be read are the same.

Shapes: M rows, K numbers in, N out.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial

import torch
from torch import Tensor, nn

from finery.engines.functions.native_weights import Matrix, Weights
from finery.models.kernels import native
from finery.models.memory import free_bytes

MOST_ROWS = 64
"""With more rows torch's products are nearly as fast, and faster where the processor has instructions for bf16."""


def serve_few_rows(model: nn.Module) -> int:
    """Let plain linear layers use the function where it serves and gives the same; returns how many do.

    It has a copy of the weights, as bf16 where that holds them without loss: where memory is short, torch goes on.
    """
    modules = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in module.__dict__ and _fits(module)]
    if not modules or sum(module.weight.nbytes for module in modules) > free_bytes(torch.device("cpu")):
        return 0
    weights = Weights()
    for module in modules:
        module.forward = partial(_forward, module, weights.matrix([(module.weight, module.bias)]), weights)
    return len(modules)


def _fits(module: nn.Linear) -> bool:
    return native.serves(module.weight) and is_right(module.weight.dtype)


def _forward(module: nn.Linear, matrix: Matrix, weights: Weights, input: Tensor) -> Tensor:
    """`weights` is what holds the matrix."""
    if input.numel() // input.shape[-1] > MOST_ROWS or torch.is_grad_enabled():
        return nn.functional.linear(input, module.weight, module.bias)
    return few_rows(input, matrix)


def few_rows(x: Tensor, matrix: Matrix) -> Tensor:
    """`torch.nn.functional.linear` for few rows, sums in fp32, in the format of `x`; the same for a row whatever the others are."""
    flat_MK = x.reshape(-1, x.shape[-1]).float().contiguous()
    y_MN = torch.empty(len(flat_MK), matrix.outer)
    places = [ctypes.c_void_p(value.data_ptr()) for value in (flat_MK, y_MN)]
    native.function("matrix_product")(ctypes.byref(matrix), *places, ctypes.c_int64(len(flat_MK)), ctypes.c_int(torch.get_num_threads()))
    return y_MN.to(x.dtype).reshape(*x.shape[:-1], matrix.outer)


@cache
def is_right(dtype: torch.dtype) -> bool:
    """Whether what the compiler made of it gives what torch gives, and the same for a row alone and among others."""
    dice = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(37, 45, generator=dice).to(dtype)
    x_MK, bias_N = torch.randn(15, 45, generator=dice), torch.randn(37, generator=dice)
    weights = Weights()
    matrix = weights.matrix([(weight_NK, bias_N)])
    found = few_rows(x_MK, matrix)
    wanted = nn.functional.linear(x_MK, weight_NK.float(), bias_N)
    alone = torch.cat([few_rows(x_MK[row : row + 1], matrix) for row in range(len(x_MK))])
    return torch.equal(found, alone) and float((found - wanted).abs().max()) < 1e-4
