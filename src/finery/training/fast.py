"""Makes a model fast: puts the kernels in place, and tries them on its first layers before a run relies on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from finery.data.rows.base import Row, lay, pad
from finery.log import get_logger
from finery.models.adapters.base import first_layers
from finery.models.head import bare, teach
from finery.models.kernels import KERNELS
from finery.models.kernels.base import Patches, in_mode
from finery.options import OptionGroup
from finery.training.choices import Choices

log = get_logger(__name__)

PACKS = "packed_attention"
"""The kernel without which rows are padded."""


@dataclass
class Fast:
    """Whether rows lie end to end, and what became of each kernel: in how many places it serves, or why it does not."""

    end_to_end: bool = False
    places: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def make_fast(model: Any, kernels: Mapping[str, OptionGroup], choices: Choices, autocast: torch.dtype | None) -> Fast:
    """Put every kernel that is on and fits in place on `model`, which is on its device already.

    Then its first layers run with some rows apart by the model's own code, and packed with all kernels. Where losses or gradients
    differ, rows are padded; where they differ still, nothing is put in place. Both are said. Choices of an earlier session are obeyed:
    the kernels that it gave up are not put in place.
    """
    with in_mode(model, training=False):  # once for all trials: dropout would differ from call to call
        base, fast, patches = bare(model), Fast(), Patches()
        teach(base)
        tries = _Trial(model, base, autocast)
        any_on = any(KERNELS[name](given).is_on for name, given in kernels.items())
        # what a checkpoint tells was tried when its run began
        plain = None if choices.knows(PACKS) or not any_on else tries.measure("apart")
        for name in KERNELS.names():
            if name != PACKS and (given_up := choices.remembered.get(name)):
                fast.left[name] = given_up.why
                choices.change(name, False, given_up.why, given_up.step)
            elif name != PACKS:
                _place(name, kernels[name], base, patches, fast)
        packing = Patches()
        if choices.settle(PACKS, lambda: (True, "a trial of the first layers gave the same")):
            fast.end_to_end = _place(PACKS, kernels[PACKS], base, packing, fast)
        if plain is not None and fast.end_to_end and (found := tries.difference(plain, "packed")):
            _give_up(PACKS, found, packing, fast)
        if plain is not None and not fast.end_to_end and (found := tries.difference(plain, "padded")):
            for name in list(fast.places):
                _give_up(name, found, patches, fast)
                choices.change(name, False, found, 0)
            teach(base)
    if fast.places:
        log.info("kernels: %s", ", ".join(f"{name} in {count}" for name, count in sorted(fast.places.items())))
    if not fast.end_to_end:
        choices.change(PACKS, False, fast.left.get(PACKS, "as in the checkpoint"), 0)
    return fast


def _place(name: str, options: OptionGroup, base: Any, patches: Patches, fast: Fast) -> bool:
    """Put one kernel in place; whether it serves anywhere."""
    kernel = KERNELS[name](options)
    why = kernel.fits(base) if kernel.is_on else "switched off"
    places = 0 if why else kernel.apply(base, patches)
    if places:
        fast.places[name] = places
    else:
        fast.left[name] = why or "nothing in this model computes it"
    return bool(places)


def _give_up(name: str, found: str, patches: Patches, fast: Fast) -> None:
    patches.undo()
    fast.places.pop(name, None)
    fast.left[name] = found
    fast.end_to_end = fast.end_to_end and name != PACKS
    log.warning("%s is not used: %s", name, f"rows are padded, since {found}" if name == PACKS else found)


class _Trial:
    """A few rows through the model's first layers, with its real weights and adapters: losses of rows, and gradients."""

    def __init__(self, model: Any, base: Any, autocast: torch.dtype | None) -> None:
        self.model, self.base, self.autocast = model, base, autocast
        dice = np.random.default_rng(0)
        vocabulary = base.config.get_text_config().vocab_size
        lengths = (24, 1, 17, 9)
        ids = [dice.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
        self.rows = [Row(row, np.where(dice.random(len(row)) < 0.7, row, -100).astype(np.int32)) for row in ids]

    def difference(self, plain: tuple[float, torch.Tensor], how: str) -> str:
        """What is not the same as `plain`, or nothing."""
        try:
            loss, gradient = self.measure(how)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            return f"a trial of the first layers failed: {' '.join(str(error).split())[:200]}"
        half = self.autocast is not None or any(weight.dtype.itemsize == 2 for weight in self.base.parameters())
        if abs(loss - plain[0]) > (1e-2 if half else 1e-4) * max(abs(plain[0]), 1e-6):
            return f"a trial of the first layers gave a loss of {loss:.5g}, not {plain[0]:.5g} as row by row"
        apart = float((gradient - plain[1]).norm() / max(float(plain[1].norm()), 1e-9))
        return f"in a trial of the first layers the gradients differ by {apart:.1%}" if apart > (0.1 if half else 1e-3) else ""

    def measure(self, how: str) -> tuple[float, torch.Tensor]:
        """The sum of the losses, and the gradients of what is trained in these layers; rows `apart`, `padded` or `packed`."""
        batches = [lay(self.rows)] if how == "packed" else [pad(self.rows)] if how == "padded" else [pad([row]) for row in self.rows]
        device = self.base.device
        autocast = torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)
        with first_layers(self.base) as layers, autocast:
            trained = [p for p in layers.parameters() if p.requires_grad]
            total, gradients = 0.0, [torch.zeros_like(p, dtype=torch.float32) for p in trained]
            for batch in batches:
                inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
                loss = self.model(targets=inputs.pop("labels"), **inputs)
                total += float(loss.detach())
                if trained and loss.requires_grad:
                    found = torch.autograd.grad(loss, trained, allow_unused=True)
                    gradients = [one if other is None else one + other.float() for one, other in zip(gradients, found, strict=True)]
        return total, torch.cat([one.flatten() for one in gradients]) if gradients else torch.zeros(1)
