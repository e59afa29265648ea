"""At the end of a run: that its weights have changed, and that what was saved is what was trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finery.data.rows.base import Row
from finery.errors import UserError
from finery.log import get_logger
from finery.models.adapters.base import Adapter
from finery.models.head import bare, teach
from finery.models.load import ModelOptions
from finery.models.quantized import is_held
from finery.models.quantizers.base import Quantizing
from finery.models.trained import find_trained, load_again
from finery.training.memory import free_bytes

log = get_logger(__name__)

SAMPLE = 1024
"""Numbers that are kept of every trained weight to tell whether it moves."""
MOST_ROWS, MOST_TOKENS = 8, 2048
"""Of the batch that both models are measured on."""
FAR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""How far the losses may lie apart, relative to 1 + loss, by the format that is computed in: one of them goes without kernels."""


class Moved:
    """Whether trained weights are still, to the bit, what they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {name: _some(weight) for name, weight in model.named_parameters() if weight.requires_grad}

    def any(self, model: nn.Module) -> bool:
        """Whether one of them has moved."""
        now = dict(model.named_parameters())
        return any(name in now and not torch.equal(_some(now[name]), old) for name, old in self._before.items())


def _some(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(flat.numel() // SAMPLE, 1)].to("cpu", copy=True)


def batch_of(units: Any, places: Sequence[int]) -> list[Row]:
    """The first rows at some places of a set, few enough to be measured in no time."""
    rows: list[Row] = []
    for place in places:
        for row in units[place]:
            if row.num_supervised and (not rows or sum(len(each.ids) for each in (*rows, row)) <= MOST_TOKENS):
                rows.append(row)
        if len(rows) >= MOST_ROWS:
            break
    return rows[:MOST_ROWS]


def prove_saved(trainer: Any, options: ModelOptions, parts: tuple[Adapter, Quantizing | None], tokenizer: Any, rows: Sequence[Row]) -> str:
    """Load what was saved anew, measure `rows` with it and with the trained model; a sentence on what was found.

    Weights that were held in few bits are so again: beside wider ones the adapter would give another loss. Raises `UserError` where the
    losses lie apart. Where there is no room for a second model, that is said.
    """
    size = sum(weight.nbytes for weight in trainer.model.parameters())
    if not rows or free_bytes(trainer.args.device) < 1.5 * size:
        return "what was saved was not loaded anew: " + ("there is no row to measure" if not rows else "memory has no room for it")
    dtype = next(weight.dtype for weight in bare(trainer.model).parameters() if weight.is_floating_point())
    adapter, quantizing = parts
    device = trainer.args.device
    with torch.random.fork_rng():
        found = find_trained(options, adapter, str(trainer.folder))
        if len(found.adapters) > 1 and is_held(bare(trainer.model)):
            return "what was saved was not loaded anew: several adapters cannot be put on weights of few bits"
        saved = load_again(found, adapter, tokenizer, options, quantizing, (dtype, device))
    teach(bare(saved))
    ours, theirs = (trainer.loss_of(model, rows) for model in (trainer.model, saved))
    computed = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else dtype
    if not abs(ours - theirs) <= FAR.get(computed, 5e-2) * (1 + abs(ours)):
        raise UserError(
            f"what was saved in {trainer.folder} is not what was trained: loaded anew, it gives a loss of {theirs:.4f} on a batch where "
            f"the trained model gives {ours:.4f}; the newest checkpoint may be sound"
        )
    return f"loaded anew, what was saved gives a loss of {theirs:.4f} on {len(rows)} rows, the trained model {ours:.4f}"
