"""The auxiliary loss of routers in mixtures of experts: it keeps them from sending everything to a few experts.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finery.log import get_logger

if TYPE_CHECKING:
    from torch import Tensor

log = get_logger(__name__)

_WEIGHT = "router_loss_weight"
"""Name under which a model keeps how much the auxiliary loss counts, where it does."""
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_top_k", "moe_topk", "top_k_experts")
"""What configs call the number of experts that a token is sent to."""


def weigh_routers(model: Any, weight: float | None) -> None:
    """Let the auxiliary loss count in training; says so where the model has no router that can be asked."""
    if not weight:
        return
    if "router_logits" not in (type(model.get_decoder())._can_record_outputs or {}) or not _num_chosen(model):
        log.warning("'moe_aux_loss_coef' has no effect: %s has no router that tells what it does", type(model).__name__)
        return
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    # transformers does so at the first forward that asks, and only once: that one may be a trial of the first layers alone
    maybe_install_capturing_hooks(model.get_decoder())
    model.__dict__[_WEIGHT] = weight
    model.config.get_text_config().router_aux_loss_coef = weight  # saved with the model


def _num_chosen(model: Any) -> int:
    config = model.config.get_text_config().to_dict()
    return next((int(config[name]) for name in _CHOSEN if config.get(name)), 0)


def router_arguments(model: Any) -> dict[str, bool]:
    """What to ask of a forward pass in training, beside its inputs."""
    return {"output_router_logits": True} if model.training and _WEIGHT in model.__dict__ else {}


def router_loss(model: Any, output: Any, inputs: Mapping[str, Any], num_supervised: int) -> Tensor | None:
    """What is added to a micro-batch's sum: weight · loss · supervised tokens, so that a step's is their weighted mean."""
    if not router_arguments(model) or not output.router_logits:  # the first layers of some models have no experts
        return None
    mask = inputs.get("attention_mask")
    found = balance(output.router_logits, _num_chosen(model), mask.flatten() if mask is not None else None)
    return model.__dict__[_WEIGHT] * num_supervised * found


def balance(logits: Sequence[Tensor], num_chosen: int, mask_N: Tensor | None) -> Tensor:
    """E · Σ f·P over experts, of all layers together (Fedus et al., 2021, arXiv 2101.03961, equations 4 to 6).

    f is the number of times that a token is sent to the expert, P its mean probability, padding left out. It is 1 times `num_chosen`
    where all experts get the same.
    """
    import torch

    probabilities = torch.cat([torch.softmax(layer.float(), -1) for layer in logits])
    counted = torch.ones(len(probabilities), device=probabilities.device) if mask_N is None else mask_N.float().repeat(len(logits))
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(num_chosen, -1).indices, 1.0)
    shares_E = (chosen * counted[:, None]).sum(0) / counted.sum()
    means_E = (probabilities * counted[:, None]).sum(0) / counted.sum()
    return probabilities.shape[1] * (shares_E * means_E).sum()
