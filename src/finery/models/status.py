"""What a model's weights are, one by one, for whoever wants to see what is trained and in which format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def weight_lines(model: nn.Module) -> Iterator[str]:
    """`name: shape, format, device, trained or frozen` of every weight."""
    for name, weight in model.named_parameters():
        shape, dtype = "x".join(map(str, weight.shape)), str(weight.dtype).removeprefix("torch.")
        yield f"{name}: {shape}, {dtype}, {weight.device}, {'trained' if weight.requires_grad else 'frozen'}"
