"""A progress bar with loss, speed and time left where a person watches, plain lines where not."""

import time
from typing import TYPE_CHECKING, Any

from finery.log import get_logger
from finery.training.callbacks.base import Callback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["ProgressBar"]

log = get_logger(__name__)


def _losses(logs: dict[str, float]) -> dict[str, float]:
    """Measured losses, by the name that a reader knows."""
    measured = {name: value for name, value in logs.items() if name.startswith("eval") and name.endswith("loss")}
    return {name.removesuffix("_loss").replace("eval_", "eval ") + " loss": value for name, value in measured.items()}


class ProgressBar(Callback):
    """Follows the run on standard error."""

    bar: Any = None
    task: Any = None
    tokens = 0
    started = 0.0
    first_step = 0

    def on_train_begin(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Open the bar where standard error is a terminal."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        choices = self.trainer.choices
        laid = "end to end" if choices["packed_attention"] else "padded"
        recomputed = ", activations are recomputed" if choices["gradient_checkpointing"] else ""
        log.info("steps begin: micro-batches of at most %d tokens, rows %s%s", choices["token_budget"], laid, recomputed)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            return
        columns = (
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, loss="-", speed="-")
        self.bar.start()

    def on_step_end(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, loss=f"{self.trainer.last_loss:.4f}", speed=f"{self._speed():.0f}")

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One plain line for a log file or a pipe, and for every evaluation."""
        logs = logs or {}
        if not state.is_world_process_zero or not (self.bar is None or _losses(logs)):
            return
        if "loss" in logs:
            done, passed = state.global_step - self.first_step, time.monotonic() - self.started
            left = passed / max(done, 1) * (state.max_steps - state.global_step)
            where = f"step {state.global_step}/{state.max_steps}"
            log.info("%s  loss %.4f  lr %.2e  %.0f tokens/s  %.0f s left", where, logs["loss"], logs["learning_rate"], self._speed(), left)
        for name, value in _losses(logs).items():
            log.info("step %d/%d  %s %.4f", state.global_step, state.max_steps, name, value)

    def close(self) -> None:
        """Close the bar and give the terminal its cursor back."""
        if self.bar is not None:
            self.bar.stop()

    def _speed(self) -> float:
        return self.trainer.tokens_trained / max(time.monotonic() - self.started, 1e-9)
