"""Ends a run whose evaluations get no better: early_stopping_steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finery.log import get_logger
from finery.options import Finding, OptionGroup
from finery.training.arguments import BEST_BY
from finery.training.callbacks.base import Callback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["EarlyStopping"]

log = get_logger(__name__)


class EarlyStopping(Callback):
    """Looks at all evaluations so far, and keeps nothing itself: a resumed run stops where an undisturbed one does."""

    class Options(OptionGroup):
        early_stopping_steps: int | None = Field(None, gt=0)
        """Stop after so many evaluations in a row of which none was better than the best; metric_for_best_model says what is compared."""

    @classmethod
    def wanted(cls, options: Any) -> bool:
        """`early_stopping_steps: 3`."""
        return options.early_stopping_steps is not None

    def check(self, run: Any) -> Iterator[Finding]:
        """There must be evaluations, and one measure of each."""
        if not self.wanted(self.options):
            return
        if run.loop.eval_strategy == "no":
            yield Finding("early_stopping_steps", "needs evaluations to stop by: set 'eval_strategy'")
        chosen = run.loop.load_best_model_at_end or run.loop.save_strategy == "best"  # of which the loop tells the same
        if run.data.eval_on_each_dataset and not chosen and not run.trainer.get("metric_for_best_model"):
            yield Finding("early_stopping_steps", "needs 'metric_for_best_model' to say which data set's loss is to get lower")

    def on_evaluate(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stop where the latest evaluations were all no better; of several data sets, only the one that is compared counts."""
        if self.trainer.is_in_train and _measure(args) in (metrics or {}) and self._is_over(args, state):
            control.should_training_stop = True

    def _is_over(self, args: "TrainingArguments", state: "TrainerState") -> bool:
        """Whether patience is used up, which is told."""
        name = _measure(args)
        measured = {int(line["step"]): float(line[name]) for line in state.log_history if name in line}
        patience = self.options.early_stopping_steps
        if not measured or (since := num_since_best(list(measured.values()), bool(args.greater_is_better))) < patience:
            return False
        step = list(measured)[-1 - since]
        log.info(
            "training stops after step %d of %d: in %d evaluations (early_stopping_steps) %s was no better than the %.4f of step %d",
            state.global_step,
            state.max_steps,
            since,
            name,
            measured[step],
            step,
        )
        return True


def _measure(args: "TrainingArguments") -> str:
    """What is compared, as evaluations call it."""
    return f"eval_{(args.metric_for_best_model or BEST_BY).removeprefix('eval_')}"


def num_since_best(values: Sequence[float], greater_is_better: bool) -> int:
    """How many values came after the first best one; NaN is never better, and nothing is better than it but a number."""
    best = 0
    for place, value in enumerate(values):
        is_better = value > values[best] if greater_is_better else value < values[best]
        if is_better or (math.isnan(values[best]) and not math.isnan(value)):
            best = place
    return len(values) - 1 - best
