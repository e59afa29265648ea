"""The rules of LOMO and AdaLomo, for one weight or many. All is computed in fp32, whatever a weight is held in."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

DECAY_RATE = 0.8
"""The mean of squares forgets 1 of t to this power in step t."""
SMALLEST_SQUARE, SMALLEST_LENGTH, LONGEST_STEP = 1e-30, 1e-3, 1.0
"""What is added to each square, the least that a weight's length counts as, and the longest step in those units; as in the package."""

Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


class Lomo(torch.optim.Optimizer):
    """w <- w (1 - lr decay) - lr g (Lv et al., 2023, arXiv 2306.09782): plain SGD, which has no state to keep."""

    def __init__(self, groups: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """What has no gradient is passed over."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad.float(), group)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        _moved(weight, gradient, group["lr"], group["weight_decay"])


class AdaLomo(Lomo):
    """Lv et al., 2023 (arXiv 2310.10195, algorithm 1): a step as long as the weight is, with squares kept by row and column.

    In a weight's step t, with b = 1 - t^-0.8 and the gradient g: r <- b r + (1 - b) mean of g^2 over columns, c <- the same over rows,
    u = g / sqrt(r c / mean(r)); u <- u / max(1, RMS(u)); w <- w - lr max(0.001, RMS(w)) u. What has one dimension keeps all squares.
    The package counts steps for all weights together, which differs for one that a step leaves out.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave. torch would round it to the weights' format."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for place, kept in state_dict["state"].items():
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    self.state[weights[place]][name] = value.to(weights[place].device, copy=True)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            kept = {"row": gradient[..., 0], "column": gradient[..., 0, :]} if gradient.ndim > 1 else {"square": gradient}
            state |= {name: torch.zeros_like(like, dtype=torch.float32) for name, like in kept.items()}
        state["step"] += 1
        rest = 1.0 - math.pow(state["step"], -DECAY_RATE)
        squares = gradient**2 + SMALLEST_SQUARE
        if gradient.ndim > 1:
            row = state["row"].mul_(rest).add_(squares.mean(dim=-1), alpha=1.0 - rest)
            column = state["column"].mul_(rest).add_(squares.mean(dim=-2), alpha=1.0 - rest)
            step = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1) * column.unsqueeze(-2).rsqrt()
        else:
            step = state["square"].mul_(rest).add_(squares, alpha=1.0 - rest).rsqrt()
        step.mul_(gradient)
        step.div_((_length(step) / LONGEST_STEP).clamp_(min=1.0))
        _moved(weight, step, float(group["lr"] * _length(weight.float()).clamp_(min=SMALLEST_LENGTH)), group["weight_decay"])


def _moved(weight: Tensor, step: Tensor, lr: float, decay: float) -> None:
    moved = weight.float() * (1.0 - lr * decay) if decay else weight.float()
    weight.copy_(moved.add_(step, alpha=-lr))


def _length(tensor: Tensor) -> Tensor:
    """The root mean square."""
    return tensor.norm(2) / math.sqrt(tensor.numel())
