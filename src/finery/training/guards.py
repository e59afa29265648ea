"""What watches every step: losses and gradients that are not finite, and runs that learn nothing."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from safetensors import SafetensorError

from finery.data.rows.base import Row
from finery.errors import UserError
from finery.log import get_logger
from finery.training.nonfinite import find_non_finite, save_repro

log = get_logger(__name__)

FOLDER = "nonfinite"
"""In the run's folder: what repeats the steps that were not finite."""
OnNonfinite = Literal["stop", "skip"]
SO_MANY = 10
"""Steps in a row without a loss, or without a gradient, that are told; and that may be skipped."""
MOST_ROWS = 8
MOST_NAMES = 3


class Guards:
    """Told of every step by the trainer; tells what is wrong with it, once for each kind of trouble."""

    def __init__(self, on_nonfinite: OnNonfinite) -> None:
        self.on_nonfinite = on_nonfinite
        self.highest_lr = 0.0
        self.num_skipped = 0  # steps of this session
        self._in_turn = {"skipped": 0, "no loss": 0, "no gradient": 0}
        self._told: set[str] = set()

    def see_step(self, trainer: Any, rows: Sequence[Row], num_supervised: int, loss: float) -> None:
        """After the backward pass of a step, finite or not."""
        step = trainer.state.global_step + 1
        self.highest_lr = max([self.highest_lr, *(float(group["lr"]) for group in trainer.optimizer.param_groups)])
        if not num_supervised:
            self._tell("unsupervised", f"step {step} has no token to learn. {places(trainer, rows)}")
        if step == trainer.first_step + 1 and math.isfinite(loss):
            self._check_learning(trainer)
        if self._counts("no loss", loss == 0.0):
            self._tell("no loss", f"the loss has been 0 for {SO_MANY} steps: nothing is learnt any more, or the labels are wrong")

    def see_norm(self, norm: float | None) -> None:
        """The length of a step's gradient, where it is still there to be measured."""
        if self._counts("no gradient", norm == 0.0):
            self._tell("no gradient", f"the gradient has been 0 for {SO_MANY} steps: nothing is learnt")

    def nonfinite(self, trainer: Any, rows: Sequence[Row], what: str) -> None:
        """A step's loss or gradient is not finite: say of which rows and where it arose, keep what repeats it, then stop or skip.

        Raises `UserError` to stop. To skip, gradients are dropped: weights and the optimizer's state stay as they are.
        """
        step = trainer.state.global_step + 1
        parts = (find_non_finite(trainer.model, partial(trainer.total_of, part)) for part in trainer.parts(rows))
        found = next((one for one in parts if one is not None), None)
        told = [trainer.told(place) for row in rows for place in row.origin]
        try:
            where = save_repro(trainer.folder / FOLDER, rows, trainer.model, step=step, loss=trainer.last_loss, told=told, found=found)
            kept = f"what repeats it is in {where}"
        except (OSError, SafetensorError) as error:
            kept = f"what repeats it could not be saved ({error})"
        if trainer.accelerator.scaler is None:  # which steps over such gradients by itself, and wants to see them
            trainer.model.zero_grad(set_to_none=True)
        origin = str(found) if found is not None else "each part of the step is finite by itself, their sum is not"
        text = f"the {what} of step {step} is not finite: {origin}. {places(trainer, rows)}; {kept}"
        if trainer.steps_in_hooks:
            raise UserError(f"{text}. Weights are stepped in the backward pass")
        if self.on_nonfinite == "stop":
            raise UserError(f"{text}. 'on_nonfinite: skip' would leave such steps out")
        if self._counts("skipped", True):
            raise UserError(f"{text}. {SO_MANY} steps in a row were skipped")
        self.num_skipped += 1
        log.warning("%s. The step is skipped", text)

    def finite(self) -> None:
        """A step went well."""
        self._in_turn["skipped"] = 0

    def _counts(self, what: str, happened: bool) -> bool:
        self._in_turn[what] = self._in_turn[what] + 1 if happened else 0
        return self._in_turn[what] >= SO_MANY

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s", text)

    def _check_learning(self, trainer: Any) -> None:
        if trainer.steps_in_hooks:  # they have let gradients go
            return
        trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        without = [name for name, weight in trained.items() if weight.grad is None]
        if len(without) == len(trained):
            raise UserError(f"nothing would be learnt: none of {len(trained)} trained weights gets a gradient")
        if without:
            names = ", ".join(without[:MOST_NAMES]) + (", ..." if len(without) > MOST_NAMES else "")
            self._tell("left out", f"{len(without)} of {len(trained)} trained weights got no gradient in the first step: {names}")


def places(trainer: Any, rows: Sequence[Row]) -> str:
    """Where the rows of a step come from, the first few of them."""
    found = list(dict.fromkeys(place for row in rows for place in row.origin))
    if not found:
        return "Its rows tell no origin"
    more = f" and {len(found) - MOST_ROWS} more" if len(found) > MOST_ROWS else ""
    return "Its rows: " + "; ".join(trainer.told(place) for place in found[:MOST_ROWS]) + more
