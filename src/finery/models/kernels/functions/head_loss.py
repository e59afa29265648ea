"""The output head and its cross entropy on supervised tokens only, in chunks: memory grows with a chunk, not with the tokens.

Shapes: S supervised tokens, H hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finery.errors import UserError
from finery.models.adapters.base import first_layers
from finery.models.head import Scores, TokenLoss, plain_loss, summed, supervised_states
from finery.models.kernels import native
from finery.models.kernels.base import compute_dtype, in_mode, is_close
from finery.models.kernels.functions.mixed_linear import COPIES
from finery.models.routers import router_loss

CHUNK_BYTES = 32 * 2**20
"""About how much memory the logits of a chunk take."""


class Shape:
    """What a model does to its logits before the softmax: a factor (Cohere, Granite) and a soft cap (Gemma 2)."""

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        scale, divisor = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
        self.factor = float(scale or 1.0) / float(divisor or 1.0)
        self.cap = float(getattr(text, "final_logit_softcapping", None) or 0.0)

    def scores(self, logits_CV: Tensor) -> Tensor:
        """What goes into the softmax, in fp32."""
        scores = logits_CV.float() * self.factor
        return self.cap * torch.tanh(scores / self.cap) if self.cap else scores


@dataclass(frozen=True)
class Measure:
    """What a chunk's tokens cost: cross entropy, unless there is a `token_loss`, which may ask for a reference's scores."""

    shape: Shape
    token_loss: TokenLoss | None = None
    reference: Scores | None = None


class ChunkedLoss(torch.autograd.Function):
    """Sum of -log p over S tokens, softmax in fp32. The gradients are computed with the loss, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_S: Tensor, how: Measure) -> Tensor:
        """The sum; kept are the finished gradients of what is trained or leads to it."""
        dtype = compute_dtype(hidden_SH, weight_VH)
        hidden, weight = hidden_SH.detach().to(dtype), COPIES.of(weight_VH, dtype)
        wants = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if wants[0] else None
        dweight: Tensor | None = None  # summed in fp32 over the chunks
        dbias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if bias_V is not None and wants[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(CHUNK_BYTES * (4 if wants[1] else 1) // (len(weight) * hidden.element_size() * (4 if how.token_loss else 1)), 16)
        for start in range(0, len(hidden), size):
            part = hidden[start : start + size]
            logits_CV = torch.nn.functional.linear(part, weight, bias_V.detach().to(dtype) if bias_V is not None else None)
            target_C = target_S[start : start + size]
            if how.token_loss is None:
                loss, gradient_CV = _chunk(logits_CV, target_C, any(wants), how.shape)
            else:
                other_CV = how.reference(start, start + size) if how.reference else None
                loss, gradient_CV = _chunk_of(how.token_loss, how.shape, logits_CV, (target_C, other_CV), any(wants))
            total += loss
            if dhidden is not None:
                torch.mm(gradient_CV, weight, out=dhidden[start : start + size])
            if wants[1]:
                more = gradient_CV.t() @ part
                dweight = more.float() if dweight is None else dweight.add_(more)
            if dbias is not None:
                dbias += gradient_CV.float().sum(0)
        ctx.gradients = dhidden, dweight, dbias
        ctx.formats = hidden_SH.dtype, weight_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the sum."""
        dhidden, dweight, dbias = ctx.gradients
        ctx.gradients = None  # they are used once, and are large
        scale = gradients[0]
        hidden_format, weight_format = ctx.formats
        return (
            (dhidden * scale).to(hidden_format) if dhidden is not None else None,
            dweight.mul_(scale).to(weight_format) if dweight is not None else None,
            dbias.mul_(scale).to(weight_format) if dbias is not None else None,
            None,
            None,
        )


def _chunk(logits_CV: Tensor, target_C: Tensor, wants_gradient: bool, shape: Shape) -> tuple[Tensor, Tensor]:
    """The chunk's loss, and its gradient in the place of the logits."""
    simple = shape.factor == 1.0 and not shape.cap
    if simple and native.serves(logits_CV):
        loss_C = torch.empty(len(logits_CV), dtype=torch.float32)
        native.call("cross_entropy", logits_CV, target_C.contiguous(), loss_C, *logits_CV.shape, wants_gradient)
        return summed(loss_C), logits_CV
    scores = shape.scores(logits_CV)
    logps = torch.log_softmax(scores, dim=-1)
    loss = summed(-logps.gather(1, target_C[:, None])[:, 0])
    if not wants_gradient:
        return loss, logits_CV
    gradient = logps.exp_()
    gradient[torch.arange(len(gradient), device=gradient.device), target_C] -= 1
    if shape.cap:
        gradient *= 1 - (scores / shape.cap) ** 2
    return loss, logits_CV.copy_(gradient.mul_(shape.factor))


def _chunk_of(
    token_loss: TokenLoss, shape: Shape, logits_CV: Tensor, asked: tuple[Tensor, Tensor | None], wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """As `_chunk`, for any loss: its gradient is found by torch, within the chunk; `asked` are the tokens and a reference's scores."""
    with torch.set_grad_enabled(wants_gradient), torch.autocast(logits_CV.device.type, enabled=False):
        leaf = logits_CV.float().requires_grad_(wants_gradient)  # a copy, or logits that nobody needs any more
        loss = token_loss(shape.scores(leaf), *asked)
        if wants_gradient:
            logits_CV = torch.autograd.grad(loss, leaf)[0].to(logits_CV.dtype)
    return loss.detach(), logits_CV


def chunked_loss(
    shape: Shape,
    model: Any,
    inputs: Mapping[str, Any],
    labels_BT: Tensor,
    token_loss: TokenLoss | None = None,
    reference: Scores | None = None,
) -> Tensor:
    """As `finery.models.head.plain_loss`, but no more logits than a chunk's are ever there."""
    states_SH, target_S, output = supervised_states(model, inputs, labels_BT)
    head = model.get_output_embeddings()
    given = (states_SH, head.weight, head.bias)
    if not torch.is_grad_enabled():  # inside the function nobody could tell
        given = tuple(tensor.detach() if tensor is not None else None for tensor in given)
    total: Any = ChunkedLoss.apply(*given, target_S, Measure(shape, token_loss, reference))
    return total + added if (added := router_loss(model, output, inputs, len(target_S))) is not None else total


def chunked_scores(shape: Shape, model: Any, inputs: Mapping[str, Any], labels_BT: Tensor) -> Scores:
    """As `finery.models.head.plain_scores`: the hidden states are kept, and the head's weights as they are now."""
    states_SH, _, _ = supervised_states(model, inputs, labels_BT)
    head = model.get_output_embeddings()
    dtype = compute_dtype(states_SH, head.weight)
    states_SH, weight, bias = states_SH.detach().to(dtype), head.weight.data, head.bias.data if head.bias is not None else None

    def scores(start: int, stop: int) -> Tensor:
        return shape.scores(nn.functional.linear(states_SH[start:stop], weight.to(dtype), bias.to(dtype) if bias is not None else None))

    return scores


def difference(model: Any) -> str:
    """What keeps `chunked_loss` from serving, told on a few random tokens against the model's own logits; nothing where it serves."""
    if type(model.get_output_embeddings()) is not nn.Linear or model.get_decoder() is model:
        return "the output head is not a plain linear layer"
    dice = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_output_embeddings().out_features, (1, 8), generator=dice).to(model.device)
    try:
        with in_mode(model, training=False), torch.no_grad(), first_layers(model):
            plain = plain_loss(model, {"input_ids": ids}, ids)
            ours = chunked_loss(Shape(model.config), model, {"input_ids": ids}, ids)
    except (TypeError, AttributeError, RuntimeError, ValueError, UserError) as error:
        return f"the model's forward is of another kind ({error})"
    return "" if is_close(ours, plain) else f"its loss differs from the model's own ({float(ours):.4g}, not {float(plain):.4g})"
