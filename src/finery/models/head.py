"""The loss as a part of a model's own forward, where wrappers for several processes hook: `model(..., targets=labels)`.

Negative labels are not learnt. Shapes: B rows, T tokens, S supervised tokens, C some of them, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from finery.models.routers import router_arguments, router_loss

if TYPE_CHECKING:
    from torch import Tensor

TokenLoss = Callable[["Tensor", "Tensor", "Tensor | None"], "Tensor"]
"""From fp32 scores (C, V) of some tokens, those tokens (C) and another model's scores, where there is one, to a sum, made by `summed`."""
Scores = Callable[[int, int], "Tensor"]
"""The fp32 scores (C, V) that a model gives to the supervised tokens from one place to another."""
LossOf = Callable[[Any, Mapping[str, Any], "Tensor", "TokenLoss | None", "Scores | None"], "Tensor"]
"""From a model, its inputs, labels (B, T), and if it is not cross entropy a loss and a reference's scores, to a sum."""
ScoresOf = Callable[[Any, Mapping[str, Any], "Tensor"], Scores]
"""From a model, its inputs and labels (B, T) to its scores."""

_INPUTS: ContextVar[Mapping[str, Any] | None] = ContextVar("inputs", default=None)
"""What the forward of this thread runs on, for layers that have to know where rows begin and end."""
_HEARD: ContextVar[list[Tensor] | None] = ContextVar("heard", default=None)
"""Where the forward of this thread puts what each supervised token costs, while somebody listens."""


@contextmanager
def gathered(place: ContextVar[list[Tensor] | None]) -> Iterator[list[Tensor]]:
    """A list that this thread finds at `place` within the block, and fills."""
    found: list[Tensor] = []
    token = place.set(found)
    try:
        yield found
    finally:
        place.reset(token)


def heard() -> AbstractContextManager[list[Tensor]]:
    """What each supervised token costs in the forwards that this thread makes meanwhile: pieces, in the order of the labels.

    Nothing is computed otherwise for that, so the numbers of a training do not depend on it. A router's loss is no token's.
    """
    return gathered(_HEARD)


def summed(costs_C: Tensor) -> Tensor:
    """The sum of what tokens cost; whoever listens hears what each does."""
    if (costs := _HEARD.get()) is not None:
        costs.append(costs_C.detach())
    return costs_C.sum()


def plain_loss(
    model: Any, inputs: Mapping[str, Any], labels_BT: Tensor, token_loss: TokenLoss | None = None, reference: Scores | None = None
) -> Tensor:
    """Sum of -log p over supervised tokens, each predicted from those before it, in fp32, through the model's own logits.

    Or the sum that `token_loss` makes of them.
    """
    import torch.nn.functional as F

    output = type(model).forward(model, **inputs, **router_arguments(model), use_cache=False)
    supervised_BT = labels_BT[:, 1:] >= 0
    scores_SV, target_S = output.logits[:, :-1][supervised_BT].float(), labels_BT[:, 1:][supervised_BT]
    if token_loss is None:
        total = F.cross_entropy(scores_SV, target_S, reduction="sum")
        if _HEARD.get() is not None:  # once more: a sum of these would round otherwise
            summed(F.cross_entropy(scores_SV.detach(), target_S, reduction="none"))
    else:
        total = token_loss(scores_SV, target_S, reference(0, len(target_S)) if reference else None)
    return total + added if (added := router_loss(model, output, inputs, len(target_S))) is not None else total


def plain_scores(model: Any, inputs: Mapping[str, Any], labels_BT: Tensor) -> Scores:
    """What the model's own forward gives."""
    logits_BTV = type(model).forward(model, **inputs, use_cache=False).logits[:, :-1]
    scores_SV = logits_BTV[labels_BT[:, 1:] >= 0].float()
    return lambda start, stop: scores_SV[start:stop]


def supervised_states(model: Any, inputs: Mapping[str, Any], labels_BT: Tensor) -> tuple[Tensor, Tensor, Any]:
    """The last hidden states (S, H) from which supervised tokens are predicted, those tokens (S), and all that came out."""
    output = model.get_decoder()(**inputs, **router_arguments(model), use_cache=False)
    hidden_BTH = output.last_hidden_state
    places = (labels_BT[:, 1:] >= 0).flatten().nonzero().squeeze(1)
    states = hidden_BTH[:, :-1].reshape(-1, hidden_BTH.shape[-1]).index_select(0, places)
    return states, labels_BT[:, 1:].flatten().index_select(0, places), output


def teach(model: Any) -> None:
    """Let a model give its loss the plain way, unless it has learnt a way already."""
    if "forward" not in model.__dict__:
        model.forward = with_loss(model, plain_loss, plain_scores)


def bare(model: Any) -> Any:
    """The model itself, without an adapter's wrapper."""
    from transformers import PreTrainedModel

    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def with_loss(model: Any, loss: LossOf, scores: ScoresOf) -> Callable[..., Any]:
    """A forward that gives the loss where it is asked with `targets` (B, T), and is the model's own otherwise.

    `token_loss` stands for cross entropy, `reference` for another model's scores; with `scores_only` it gives its own.
    """

    def forward(
        *args: Any,
        targets: Tensor | None = None,
        token_loss: TokenLoss | None = None,
        reference: Scores | None = None,
        scores_only: bool = False,
        **inputs: Any,
    ) -> Any:
        if targets is None:
            return type(model).forward(model, *args, **inputs)
        # peft hands on every argument of its own forward, given or not
        given = {name: value for name, value in inputs.items() if value is not None and name != "use_cache"}
        with _known(given):
            return scores(model, given, targets) if scores_only else loss(model, given, targets, token_loss, reference)

    return forward


@contextmanager
def _known(inputs: Mapping[str, Any]) -> Iterator[None]:
    token = _INPUTS.set(inputs)
    try:
        yield
    finally:
        _INPUTS.reset(token)


def row_lengths(batch: int, tokens: int, device: Any) -> Tensor:
    """How many tokens the row of each token has (B, T), padding not counted, in the forward that this thread runs.

    A row begins where its place in a batch does, and wherever positions begin anew.
    """
    import torch

    inputs = _INPUTS.get() or {}
    firsts = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    positions = inputs.get("position_ids")
    if positions is not None and positions.shape[-1] == tokens and positions.ndim == 2:
        firsts |= positions == 0
    firsts[:, 0] = True
    mask = inputs.get("attention_mask")
    counted = mask.flatten().long() if mask is not None and mask.shape == firsts.shape else torch.ones_like(firsts).flatten().long()
    segments = firsts.flatten().cumsum(0) - 1
    sizes = torch.zeros(int(segments[-1]) + 1, dtype=torch.long, device=device).index_add_(0, segments, counted)
    return sizes.clamp(min=1)[segments].view(batch, tokens)
