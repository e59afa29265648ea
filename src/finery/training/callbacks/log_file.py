"""trainer_log.jsonl: one JSON object a line, flushed as it is written."""

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.files import replace_text
from finery.log import get_logger
from finery.training.callbacks.base import Callback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["LogFile"]

log = get_logger(__name__)

NAMES = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
"""Our names of the trainer's metrics, as existing tools read them."""
SPEEDS = ("tokens_per_second", "supervised_tokens_per_second", "mfu", "data_share", "forward_share", "backward_share", "optimizer_share")
"""Of the steps since the last line; see `finery.training.clock`."""


class LogFile(Callback):
    """Writes what existing tools read: steps, loss, lr, epoch, percentage, times; empty values are left out."""

    started = 0.0
    first_step = 0
    is_failing = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: list[str] = []  # lines that could not be written yet

    def on_train_begin(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Start the clock, and the file: what another run has left in it goes, or what this one did beyond the checkpoint."""
        self.started = time.monotonic()
        self.first_step = state.global_step
        path = _path(args)
        if state.is_world_process_zero and path.exists():
            try:
                cut_back(path, [int(line["step"]) for line in state.log_history], state.global_step)
            except OSError as error:
                self._tell(path, error)

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line. One that cannot be written waits for the next: a full disk ends no run."""
        if not state.is_world_process_zero or logs is None:
            return
        self._waiting.append(json.dumps(self._line(state, logs)))
        path = _path(args)
        try:
            append(path, self._waiting)
        except OSError as error:
            self._tell(path, error)
            return
        if self.is_failing:
            log.info("%s can be written again, and holds the lines that had to wait", path)
        self.is_failing = False
        self._waiting = []

    def _line(self, state: "TrainerState", logs: dict[str, float]) -> dict[str, Any]:
        passed = time.monotonic() - self.started if self.started else 0.0
        done = state.global_step - self.first_step
        left = passed / done * (state.max_steps - state.global_step) if done else 0.0
        values = {ours: logs[theirs] for theirs, ours in NAMES.items() if theirs in logs}
        values |= {name: logs[name] for name in SPEEDS if name in logs}
        measured = {name: value for name, value in logs.items() if name.startswith("eval_") and name.endswith(("_loss", "_accuracy"))}
        values |= {name: value for name, value in measured.items() if name not in NAMES}
        if state.num_input_tokens_seen and passed:
            values |= {"throughput": round(state.num_input_tokens_seen / passed, 2), "total_tokens": state.num_input_tokens_seen}
        return {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            **values,
            "epoch": round(state.epoch or 0.0, 4),
            "percentage": round(100 * state.global_step / state.max_steps, 2) if state.max_steps > 0 else 100.0,
            "elapsed_time": str(timedelta(seconds=int(passed))),
            "remaining_time": str(timedelta(seconds=int(left))),
        }

    def _tell(self, path: Path, error: OSError) -> None:
        if not self.is_failing:
            log.warning("%s cannot be written (%s): its lines wait, and the run goes on", path, error.strerror or error)
        self.is_failing = True


def _path(args: "TrainingArguments") -> Path:
    return Path(str(args.output_dir)) / "trainer_log.jsonl"


def append(path: Path, lines: Iterable[str]) -> None:
    """Write lines whole or not at all, as far as a disk allows: what was written of them before it failed is taken back."""
    with path.open("ab", buffering=0) as file:  # no buffer, which would try to write its rest again when the file is closed
        end = file.seek(0, os.SEEK_END)
        rest = memoryview("".join(f"{line}\n" for line in lines).encode())
        try:
            while rest:
                rest = rest[file.write(rest) or 0 :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def cut_back(path: Path, logged: Iterable[int], last: int) -> None:
    """Leave the lines that a run had written when it saved the checkpoint of step `last`; torn ones go as well.

    `logged` has the step of each line that the checkpoint knows of: of that step, what followed the checkpoint has no place here.
    """
    text = path.read_bytes().decode("utf-8", "replace")
    num_of_last = sum(step == last for step in logged)
    kept: list[str] = []
    for line in text.splitlines(keepends=True) if last else ():
        step = _step(line)
        num_of_last -= step == last
        if line.endswith("\n") and step is not None and (step < last or (step == last and num_of_last >= 0)):
            kept.append(line)
    if "".join(kept) != text:
        replace_text(path, "".join(kept))


def _step(line: str) -> int | None:
    """The step of a line; none where it is torn."""
    try:
        step = json.loads(line)["current_steps"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None
