"""How many tokens a micro-batch may hold, and whether activations must be recomputed, from the model's shapes and free memory.

A first rule: what the backward pass needs of one token is counted from the shapes; nothing is tried out.
"""

from dataclasses import dataclass
from typing import Any

import torch

from finery.models.adapters.base import num_trained
from finery.models.memory import free_bytes

MOST_TOKENS = {"cpu": 1024, "cuda": 32768}
"""More tokens in one micro-batch make nothing faster: a CPU's products are as fast with 256 rows, and its caches are small."""
SHARE = {"cpu": 0.5, "cuda": 0.8}
"""The part of free memory that activations may take; a CPU's is shared with everything else on the machine."""
FEWEST_TOKENS = 64


@dataclass(frozen=True)
class Fit:
    """Tokens of a micro-batch, whether activations are recomputed, and the reckoning in words."""

    token_budget: int
    recompute: bool
    why: str


def fit(model: Any, longest: int, device: torch.device, recompute: bool | None = None) -> Fit:
    """What fits beside the weights of `model`, its gradients and its optimizer's states; `recompute` where that is asked for or ruled out.

    Activations are recomputed only where those of the longest row would not fit otherwise.
    """
    to_come = num_trained(model) * (4 + 8)  # a gradient and Adam's two moments, fp32
    free = free_bytes(device)
    room = max(SHARE[device.type] * (free - to_come), 0)
    most = MOST_TOKENS[device.type]
    whole, lean = bytes_per_token(model, recompute=False), bytes_per_token(model, recompute=True)
    chosen = room < whole * longest if recompute is None else recompute
    each = lean if chosen else whole
    budget = int(max(min(most, room // each), FEWEST_TOKENS))
    return Fit(budget, chosen, f"{each / 2**20:.2f} MB a token, {max(free - to_come, 0) / 2**30:.1f} GB free")


def bytes_per_token(model: Any, recompute: bool) -> int:
    """What the backward pass keeps of one token: per layer the inputs of its products, norms, activation and attention."""
    config = model.config.get_text_config()
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    # what families of models call alike is asked through transformers' names, the rest where a config has it
    others = config.to_dict()
    keys = others.get("num_key_value_heads") or heads
    width = others.get("head_dim") or hidden // heads
    inner = (others.get("intermediate_size") or others.get("ffn_dim") or 4 * hidden) * (others.get("num_experts_per_tok") or 1)
    layer = 6 * hidden + 2 * (heads + keys) * width + 3 * inner
    size = next(model.parameters()).dtype.itemsize
    return size * (layers * hidden + layer if recompute else layers * layer)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: a GPU's, or this process's on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
