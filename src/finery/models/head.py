"""The loss as a part of a model's own forward, where wrappers for several processes hook: `model(..., targets=labels)`.

Negative labels are not learnt. Shapes: B rows, T tokens, S supervised tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LossOf = Callable[[Any, Mapping[str, Any], "Tensor"], "Tensor"]
"""From a model, its inputs and labels (B, T) to a sum."""


def plain_loss(model: Any, inputs: Mapping[str, Any], labels_BT: Tensor) -> Tensor:
    """Sum of -log p over supervised tokens, each predicted from those before it, in fp32, through the model's own logits."""
    import torch.nn.functional as F

    logits_BTV = type(model).forward(model, **inputs, use_cache=False).logits[:, :-1]
    supervised_BT = labels_BT[:, 1:] >= 0
    return F.cross_entropy(logits_BTV[supervised_BT].float(), labels_BT[:, 1:][supervised_BT], reduction="sum")


def supervised_states(model: Any, inputs: Mapping[str, Any], labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden states (S, H) from which supervised tokens are predicted, and those tokens (S)."""
    hidden_BTH = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    places = (labels_BT[:, 1:] >= 0).flatten().nonzero().squeeze(1)
    states = hidden_BTH[:, :-1].reshape(-1, hidden_BTH.shape[-1]).index_select(0, places)
    return states, labels_BT[:, 1:].flatten().index_select(0, places)


def teach(model: Any) -> None:
    """Let a model give its loss the plain way, unless it has learnt a way already."""
    if "forward" not in model.__dict__:
        model.forward = with_loss(model, plain_loss)


def bare(model: Any) -> Any:
    """The model itself, without an adapter's wrapper."""
    from transformers import PreTrainedModel

    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def with_loss(model: Any, loss: LossOf) -> Callable[..., Any]:
    """A forward that gives the loss where it is asked with `targets` (B, T), and is the model's own otherwise."""

    def forward(*args: Any, targets: Tensor | None = None, **inputs: Any) -> Any:
        if targets is None:
            return type(model).forward(model, *args, **inputs)
        # peft hands on every argument of its own forward, given or not
        return loss(model, {name: value for name, value in inputs.items() if value is not None and name != "use_cache"}, targets)

    return forward
