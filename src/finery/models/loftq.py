"""LoftQ (Li et al., 2023, arXiv 2310.08659): an adapter that starts as the main parts of what few bits have rounded off.

Shapes: A (r, inputs), B (outputs, r), scale s: s·B·A begins as the best approximation of rank r of W - Q(W). One round of the paper's
alternation: with more, Q would no longer be what a quantizer makes of the plain weights.

Such an adapter is right beside Q(W) and nowhere else, so how the base was held is written beside it, and a merge starts from Q(W), widened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.errors import UserError
from finery.models.pissa import lora_layers
from finery.models.quantized import HELD, OPENED, Held
from finery.models.quantizers import QUANTIZERS
from finery.models.quantizers.base import Quantizing
from finery.models.shards import Shards

if TYPE_CHECKING:
    import torch

FILE = "held_in.json"
"""How the base was held that an adapter belongs to, in its folder."""


def starts_from_rounding(model: Any) -> None:
    """Let a fresh LoRA start so; raises `UserError` where the plain weights of a layer are not to be found."""
    import torch

    base = model.get_base_model()
    plain = Shards(Path(base.config._name_or_path))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for path, layer, name in lora_layers(model):
            held: Held | None = layer.get_base_layer().__dict__.get(HELD)
            if held is None:
                continue
            quantised = held.weight(torch.float32)
            lost = _plain_weight(plain, path.removeprefix("base_model.model.")).to(quantised) - quantised
            u, s, v = torch.svd_lowrank(lost, q=layer.r[name], niter=4)
            layer.lora_B[name].weight.copy_(u * s.sqrt() / layer.scaling[name])
            layer.lora_A[name].weight.copy_((v * s.sqrt()).t())
    model.save_pretrained = partial(_save, model.save_pretrained, base.__dict__[OPENED])


def _plain_weight(shards: Shards, path: str) -> Any:
    """The plain weight of the layer at `path`."""
    try:
        return shards.tensor(f"{path}.weight")
    except KeyError:
        raise UserError(f"'loftq_init' needs the plain weights of {path}, which {shards.folder} does not hold under that name") from None


def _save(save: Callable[..., None], opened: dict[str, Any], folder: str, **how: Any) -> None:
    save(folder, **how)
    (Path(folder) / FILE).write_text(json.dumps(opened, indent=1), encoding="utf-8")


def held_in(folders: Sequence[Path]) -> tuple[Quantizing, torch.dtype] | None:
    """How the base must be held for these adapters, and the number format that it was loaded in; None: plainly."""
    import torch

    for folder in folders:
        if (folder / FILE).exists():
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
            part = QUANTIZERS[found["method"]]
            return Quantizing(part(part.Options(**found["options"])), found["bits"]), getattr(torch, found["dtype"])
    return None
