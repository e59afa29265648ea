"""Several optimizers as one: each steps some of the weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Joined(torch.optim.Optimizer):
    """Steps each of its parts. Their groups are its own, so that a schedule of learning rates reaches them all."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([dict(group) for part in parts for group in part.param_groups], dict(parts[0].defaults))
        self._gather()

    def _gather(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """What has no gradient is passed over."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Those of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave; raises `ValueError` where it was that of other parts."""
        states = state_dict["parts"]
        if len(states) != len(self.parts):
            raise ValueError(f"it holds the state of {len(states)} optimizers, and there are {len(self.parts)}")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._gather()  # loading makes new groups


class InHooks(Joined):
    """An optimizer for each weight, which steps as soon as the weight's gradient is whole; the gradient is then let go.

    So the gradients of all weights are never held at once. A step that is cut into several micro-batches sums them up before,
    and only the last backward pass steps: `is_last` tells when that is. What its hooks have not reached, `step` does.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], is_last: Callable[[], bool]) -> None:
        super().__init__(parts)
        self.is_last = is_last
        for part in parts:
            for group in part.param_groups:
                for weight in group["params"]:
                    weight.register_post_accumulate_grad_hook(partial(self._step_one, part))

    def _step_one(self, part: torch.optim.Optimizer, weight: Tensor) -> None:
        if self.is_last():
            part.step()
            weight.grad = None
