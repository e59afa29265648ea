"""The loss of every row, as Parquet files in loss_ledger/; a step whose loss leaps names its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.data.rows.base import Row
from finery.log import get_logger
from finery.options import Finding, OptionGroup
from finery.training.callbacks.base import Callback

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from finery.training.loss_ledger import Cost, Course, Ledger

__all__ = ["LossLedger"]

log = get_logger(__name__)

NUM_NAMED = 3
"""A leap of the loss names so many rows."""


class LossLedger(Callback):
    """Listens to the losses that training computes anyway; see `finery.training.loss_ledger`."""

    class Options(OptionGroup):
        loss_ledger: bool = False
        """Note the loss of every row in every step (folder loss_ledger, Parquet): a leap of the loss names its rows, and
        'finery show RUN.yaml --worst 20' shows the rows that are learnt worst, among which wrong answers are found."""

    ledger: Ledger | None = None
    course: Course
    _heard: list[tuple[Sequence[Row], list[Tensor]]]

    def check(self, run: Any) -> Iterator[Finding]:
        """Losses of tokens are what it knows."""
        if self.options.loss_ledger and not run.method.learns_tokens:
            yield Finding("loss_ledger", f"notes the losses of tokens, and 'stage: {run.choices.stage}' has others: leave it out")

    @classmethod
    def wanted(cls, options: Any) -> bool:
        """`loss_ledger: true`."""
        return options.loss_ledger

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Listen from now on, and go on with the ledger as it was at this step."""
        from finery.training.loss_ledger import FOLDER, Course, Ledger

        self._heard, self.course = [], Course()
        self.ledger = Ledger(Path(str(args.output_dir)) / FOLDER, self.trainer.train_dataset.samples, args.process_index)
        self.ledger.begin(state.global_step)
        self.trainer.watch = self._listen
        self.trainer.before_save.append(self.ledger.flush)

    @contextmanager
    def _listen(self, rows: Sequence[Row]) -> Iterator[None]:
        from finery.models.head import heard

        if not self.trainer.model.training:
            yield
            return
        with heard() as costs:
            yield
        self._heard.append((rows, costs))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step, and tell where it stands out."""
        from finery.training.loss_ledger import costs_of

        assert self.ledger is not None
        costs = costs_of(self.trainer.step_rows, self._heard)
        self._heard.clear()
        if not costs:
            return
        self.ledger.add(state.global_step, costs)
        mean = sum(cost.total for cost in costs) / sum(cost.tokens for cost in costs)
        if (usual := self.course.stands_out(mean)) is not None:
            worst = sorted(costs, key=lambda cost: -cost.mean)[:NUM_NAMED]
            text = "the loss of step %d leaps to %.4g, from %.4g as it was lately; its worst rows: %s"
            log.warning(text, state.global_step, mean, usual, "; ".join(map(self._told, worst)))

    def _told(self, cost: Cost) -> str:
        names = [self.trainer.train_dataset.samples.told(place) for place in cost.places[:NUM_NAMED]]
        more = f" and {len(cost.places) - NUM_NAMED} more" if len(cost.places) > NUM_NAMED else ""
        return f"{' with '.join(names)}{more} ({cost.mean:.4g})"

    def close(self) -> None:
        """What is not written yet; a run that fails leaves the ledger of all its steps."""
        if self.ledger is not None:
            self.ledger.try_flush()
