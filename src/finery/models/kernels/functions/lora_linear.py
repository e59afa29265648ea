"""Linear layers with LoRA as one operation; layers that read the same input share its thin products.

Weights that are held in few bits are widened for a product, forward and backward, and let go again.

Shapes: T tokens, I inputs, O outputs, r rank, R the ranks of a group together. W (O, I), A (r, I), B (O, r), scale s.
y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ (Hu et al., 2021, arXiv 2106.09685), hence
dx = dy·W + s·(dy·B)·A,  dA = s·(dy·B)ᵀ·x,  dB = s·dyᵀ·(x·Aᵀ).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finery.models.kernels.base import compute_dtype, untouched
from finery.models.quantized import HELD, Held

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
"""Names of sibling layers that read the same input."""


@dataclass(frozen=True)
class Frozen:
    """What does not change while layers compute: how each weight (O, I) is had in a format, each scale, and dropout."""

    weights: Sequence[Callable[[torch.dtype], Tensor]]
    scales: Sequence[float]
    dropout: float
    dtype: torch.dtype  # of products


class Products(torch.autograd.Function):
    """The outputs of n layers on one input; arguments are x, what is frozen, then n each of bias, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The n outputs; kept are x, x·Aᵀ, the stacked A and what dropout kept."""
        n, dtype, dropout = len(frozen.scales), frozen.dtype, frozen.dropout
        biases, downs, ups = (tensors[place * n : (place + 1) * n] for place in range(3))
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        stacked = torch.cat([down.to(dtype) for down in downs])  # type: ignore[union-attr]
        masks = [_mask(flat, dropout) for _ in frozen.scales] if dropout else []
        inner = _inner(flat, stacked, [down.shape[0] for down in downs], masks, dropout)  # type: ignore[union-attr]
        outputs = []
        for scale, weight, bias, up, low in zip(frozen.scales, frozen.weights, biases, ups, inner, strict=True):
            y = torch.nn.functional.linear(flat, weight(dtype), bias.to(dtype) if bias is not None else None)
            y.addmm_(low, up.t().to(dtype), alpha=scale)  # type: ignore[union-attr]
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, stacked, *ups, *inner, *masks)
        ctx.set_materialize_grads(False)
        ctx.frozen, ctx.shape, ctx.format = frozen, x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Gradients of x, A and B; an output that nobody used adds nothing."""
        frozen: Frozen = ctx.frozen
        n = len(frozen.scales)
        flat, stacked, *rest = ctx.saved_tensors
        ups, inner, masks = (rest[place * n : (place + 1) * n] for place in range(3))
        wants_x = ctx.needs_input_grad[0]
        dx: Tensor | None = None
        dinner, dups = [], []
        for place, dy in enumerate(gradients):
            if dy is None:
                dinner.append(torch.zeros_like(inner[place]))
                dups.append(torch.zeros_like(ups[place]))
                continue
            dy = dy.reshape(len(flat), -1).to(flat.dtype)
            up = ups[place].to(flat.dtype)
            dinner.append((dy @ up).mul_(frozen.scales[place]))
            # the thin operand first: products with few rows run better than ones with few columns
            dups.append((inner[place].t() @ dy).mul_(frozen.scales[place]).t().to(ups[place].dtype))
            if wants_x:
                weight = frozen.weights[place](flat.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        stack = torch.cat(dinner, dim=1)
        if wants_x:
            dx = _input_gradient(dx, stack, stacked, [low.shape[1] for low in inner], masks, frozen.dropout)
            dx = dx.view(ctx.shape).to(ctx.format)
        ddowns = _down_gradients(flat, dinner, stack, masks, frozen.dropout)
        return dx, None, *[None] * n, *[d.to(u.dtype) for d, u in zip(ddowns, ups, strict=True)], *dups


def _mask(flat: Tensor, dropout: float) -> Tensor:
    """What dropout keeps, drawn as torch draws it."""
    return torch.nn.functional.dropout(torch.ones_like(flat, dtype=torch.float32), dropout) != 0


def _inner(flat: Tensor, stacked: Tensor, ranks: Sequence[int], masks: Sequence[Tensor], dropout: float) -> list[Tensor]:
    """x·Aᵀ of every layer; without dropout in one product."""
    if not masks:
        return [part.contiguous() for part in (flat @ stacked.t()).split(list(ranks), dim=1)]
    return [_kept(flat, mask, dropout) @ down.t() for mask, down in zip(masks, stacked.split(list(ranks)), strict=True)]


def _kept(flat: Tensor, mask: Tensor, dropout: float) -> Tensor:
    return flat * mask / (1 - dropout)


def _input_gradient(
    dx: Tensor | None, stack: Tensor, stacked: Tensor, ranks: Sequence[int], masks: Sequence[Tensor], dropout: float
) -> Tensor:
    """Adds what reaches the input through the thin products."""
    dx = torch.zeros(len(stack), stacked.shape[1], dtype=stack.dtype, device=stack.device) if dx is None else dx
    if not masks:
        return dx.addmm_(stack, stacked)
    for low, down, mask in zip(stack.split(list(ranks), dim=1), stacked.split(list(ranks)), masks, strict=True):
        dx += _kept(low @ down, mask, dropout)
    return dx


def _down_gradients(flat: Tensor, dinner: Sequence[Tensor], stack: Tensor, masks: Sequence[Tensor], dropout: float) -> list[Tensor]:
    if not masks:
        return list((stack.t() @ flat).split([low.shape[1] for low in dinner]))
    return [low.t() @ _kept(flat, mask, dropout) for low, mask in zip(dinner, masks, strict=True)]


@dataclass
class Group:
    """Sibling layers; the first that is called computes all, the others take what is ready if they are asked with the same input."""

    layers: list[Any]
    own: threading.local = field(default_factory=threading.local)  # several threads may run the model

    @property
    def ready(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By place: the input and the output."""
        return self.own.__dict__.setdefault("ready", {})

    def forwards(self) -> Iterator[tuple[Any, Callable[[Tensor], Tensor]]]:
        """Every layer, and what it is to compute instead of its own forward."""
        return ((layer, partial(self.output, place)) for place, layer in enumerate(self.layers))

    def output(self, place: int, x: Tensor) -> Tensor:
        """The layer's output for `x`."""
        if place in self.ready:
            asked, y = self.ready.pop(place)
            if asked is x:
                return y
        if not all(map(_plain_now, self.layers)):
            return type(self.layers[place]).forward(self.layers[place], x)
        from_here = self.layers if place == 0 else [self.layers[place]]
        outputs = _compute(from_here, x)
        if place == 0:
            self.own.ready = {later: (x, y) for later, y in enumerate(outputs) if later}
        return outputs[0]


def _compute(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    names = [layer.active_adapters[0] for layer in layers]
    bases = [layer.base_layer for layer in layers]
    pairs = list(zip(layers, names, strict=True))
    dropout = next((float(part.p) for part in (layers[0].lora_dropout[names[0]],) if isinstance(part, nn.Dropout) and part.training), 0.0)
    weights = [_weight_of(base) for base in bases]
    # a packed weight's own format says nothing of products: the input's does
    dtype = compute_dtype(x, x if any(HELD in base.__dict__ for base in bases) else bases[0].weight)
    return Products.apply(  # type: ignore[return-value]
        x,
        Frozen(weights, [layer.scaling[name] for layer, name in pairs], dropout, dtype),
        *[base.bias for base in bases],
        *[layer.lora_A[name].weight for layer, name in pairs],
        *[layer.lora_B[name].weight for layer, name in pairs],
    )


def _weight_of(base: Any) -> Callable[[torch.dtype], Tensor]:
    """How the weights of a frozen layer are had, plain or held in few bits."""
    held: Held | None = base.__dict__.get(HELD)
    return held.weight if held is not None else base.weight.to


def _plain_now(layer: Any) -> bool:
    """Whether the adapter counts at this moment: none is merged, switched off or beside another."""
    return not layer.disable_adapters and not layer.merged and len(layer.active_adapters) == 1


def serves(layer: nn.Module) -> bool:
    """Plain LoRA on a linear layer with frozen weights, plain or widened for products; everything else is left to peft."""
    from peft.tuners.lora.layer import Linear, LoraLayer

    if not isinstance(layer, LoraLayer) or not isinstance(layer, nn.Module) or not untouched(layer) or not _plain_now(layer):
        return False
    base: Any = layer.base_layer
    held: Held | None = base.__dict__.get(HELD)
    if not (held.is_exact if held is not None else type(layer) is Linear and type(base) is nn.Linear):
        return False
    name = layer.active_adapters[0]
    special = name in layer.lora_variant or layer.lora_B[name].bias is not None or name not in layer.lora_A
    frozen = held is not None or not base.weight.requires_grad
    return not special and frozen and (base.bias is None or not base.bias.requires_grad)


def groups(families: Iterable[dict[str, nn.Module]], serves: Callable[[nn.Module], bool]) -> Iterator[Group]:
    """The layers that are served, of all families of siblings: those that share an input together, the others alone."""
    for children in families:
        left = {name: child for name, child in children.items() if serves(child)}
        for names in TOGETHER:
            layers = [left[name] for name in names if name in left]
            if len(layers) > 1 and len({(layer.in_features, _dropout(layer)) for layer in layers}) == 1:  # type: ignore[arg-type]
                yield Group(layers)
                left = {name: layer for name, layer in left.items() if name not in names}
        yield from (Group([layer]) for layer in left.values())


def _dropout(layer: Any) -> float:
    return float(getattr(layer.lora_dropout[layer.active_adapters[0]], "p", 0.0))
