"""Decoders whose layers are such as Llama's: which they are, and their parts as native/decoder.h takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finery.engines.functions.native_weights import Decoder, Layer, Linear, Weights
from finery.engines.functions.rows import RowCache
from finery.models.kernels import native
from finery.models.memory import free_bytes

FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Kind:
    """In what layers depart from Llama's."""

    added: float = 0.0  # to the weights of norms
    norms: tuple[str | None, ...] = (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    )  # before attention, after, before the MLP, after
    is_joined: bool = False  # queries, keys and values are made by one layer, gate and up as well
    has_caps: bool = False  # of scores
    may_not_rotate: bool = False  # some layers


KINDS = {
    "llama": Kind(),
    "mistral": Kind(),
    "qwen2": Kind(),
    "qwen3": Kind(),
    "smollm3": Kind(may_not_rotate=True),
    "phi3": Kind(is_joined=True),
    "gemma": Kind(added=1.0),
    "gemma2": Kind(added=1.0, norms=FOUR, has_caps=True),
    "gemma3_text": Kind(added=1.0, norms=FOUR, has_caps=True),
}
"""By the type of model that its config names."""
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
STEADY_ROTATIONS = {"default", "linear", "llama3", "yarn"}
"""Those in which an angle depends on a token's place alone."""
NO_WINDOW = 2**62


def refusal(model: Any) -> str:
    """Nothing, or why the native step does not serve."""
    config = model.config
    kind = config.model_type
    folder = kind.removesuffix("_text")
    if kind not in KINDS or type(model).__module__ != f"transformers.models.{folder}.modeling_{folder}" or "lm_head" not in model._modules:
        return f"{type(model).__name__} is not of a kind that is known"
    if not all(native.serves(value) for value in model.parameters()):
        return "weights are not plain fp32 or bf16 numbers on a CPU, or there is no C compiler"
    if not all(_is_plain(module) for module in model.modules()):
        return "some layers do more than the model's own"
    if activation(model) not in ACTIVATIONS or not set(rotations(model).values()) <= STEADY_ROTATIONS or not RowCache.serves(config):
        return "an activation, a rotation or a cache that is not known"
    if sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear)) > free_bytes(torch.device("cpu")):
        return "there is no memory for a copy of the weights"
    return ""


def _is_plain(module: nn.Module) -> bool:
    known = type(module).__module__.startswith(("torch.nn.modules.", "transformers."))
    return known and "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


def activation(model: Any) -> str:
    """Between gate and up."""
    config = model.config
    return config.hidden_activation if KINDS[config.model_type].has_caps else config.hidden_act


def rotations(model: Any) -> dict[str | None, str]:
    """How angles are stretched, for all layers or for each type of layers."""
    kind = model.model.rotary_emb.rope_type
    return kind if isinstance(kind, dict) else {None: kind}


def caps(model: Any) -> tuple[float, float]:
    """Between which bounds scores of attention, and of tokens, stay; 0: there are none."""
    config = model.config
    if not KINDS[config.model_type].has_caps:
        return 0.0, 0.0
    return config.attn_logit_softcapping or 0.0, config.final_logit_softcapping or 0.0


def decoder_of(model: Any, weights: Weights) -> Decoder:
    """The structure, but for how much of a head is rotated; what it points to is kept by itself and `weights`."""
    config, layers, attention = model.config, model.model.layers, model.model.layers[0].self_attn
    is_sliding = [layer.is_sliding for layer in RowCache(config).held]
    windows = [config.sliding_window if sliding else NO_WINDOW for sliding in is_sliding]
    made = (Layer * len(layers))(*(_layer(model, number, windows[number], weights) for number in range(len(layers))))
    return Decoder(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        width=attention.head_dim,
        num_layers=len(layers),
        is_gelu=ACTIVATIONS[activation(model)],
        eps=config.rms_norm_eps,
        scale=attention.scaling,
        cap=caps(model)[0],
        layers=made,
        norm=weights.vector(model.model.norm.weight, KINDS[config.model_type].added),
        head=weights.matrix([_linear(model.lm_head)]),
    )


def check_shapes(decoder: Decoder) -> None:
    """Raise `ValueError` where weights have other sizes than the config says: the native function trusts it, and would write anywhere."""
    hidden, attended = decoder.hidden, decoder.heads * decoder.width
    come_in = attended + 2 * decoder.kv_heads * decoder.width
    for number in range(decoder.num_layers):
        layer = decoder.layers[number]
        found = [(one.outer, one.inner) for one in (layer.in_, layer.out, layer.down)] + [layer.gated.inner]
        if found != [(come_in, hidden), (hidden, attended), (hidden, layer.gated.outer), hidden]:
            raise ValueError(f"layer {number} has weights of other sizes than the config tells: {found}")
    if decoder.head.inner != hidden:
        raise ValueError("the head takes another size than the layers give")


def _layer(model: Any, number: int, window: int, weights: Weights) -> Layer:
    kind, layer = KINDS[model.config.model_type], model.model.layers[number]
    attention, known = layer.self_attn, list(rotations(model))
    rotates = not kind.may_not_rotate or bool(attention.use_rope)
    rotation = known.index(model.config.layer_types[number]) if known != [None] else 0
    norms = [layer._modules.get(name) if name else None for name in kind.norms] + [attention._modules.get(f"{x}_norm") for x in "qk"]
    come_in, gated = ([*_parts(module, kind)] for module in (attention, layer.mlp))
    return Layer(
        *(weights.vector(norm.weight, kind.added) if norm is not None else None for norm in norms),
        weights.matrix(come_in),
        weights.matrix([_linear(attention.o_proj)]),
        weights.matrix(gated, in_turn=True),
        weights.matrix([_linear(layer.mlp.down_proj)]),
        window,
        rotation if rotates else -1,
    )


def _parts(module: Any, kind: Kind) -> Iterator[Linear]:
    """What makes queries, keys and values of an attention's input, or gate and up of an MLP's."""
    is_mlp = "down_proj" in module._modules
    if not kind.is_joined:
        for name in ("gate", "up") if is_mlp else "qkv":
            yield _linear(getattr(module, f"{name}_proj"))
    elif is_mlp:
        yield from ((weight, None) for weight in module.gate_up_proj.weight.chunk(2))
    else:
        yield _linear(module.qkv_proj)


def _linear(module: nn.Linear) -> Linear:
    return module.weight, module.bias
