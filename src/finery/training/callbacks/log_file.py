"""trainer_log.jsonl: one JSON object a line, flushed as it is written."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.training.callbacks.base import Callback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["LogFile"]

NAMES = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
"""Our names of the trainer's metrics, as existing tools read them."""
SPEEDS = ("tokens_per_second", "supervised_tokens_per_second", "mfu", "data_share", "forward_share", "backward_share", "optimizer_share")
"""Of the steps since the last line; see `finery.training.clock`."""


class LogFile(Callback):
    """Writes what existing tools read: steps, loss, lr, epoch, percentage, times; empty values are left out."""

    started = 0.0
    first_step = 0

    def on_train_begin(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.time()
        self.first_step = state.global_step

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if not state.is_world_process_zero or logs is None:
            return
        passed = time.time() - self.started if self.started else 0.0
        done = state.global_step - self.first_step
        left = passed / done * (state.max_steps - state.global_step) if done else 0.0
        values = {ours: logs[theirs] for theirs, ours in NAMES.items() if theirs in logs}
        values |= {name: logs[name] for name in SPEEDS if name in logs}
        values |= {name: value for name, value in logs.items() if name.startswith("eval_") and name.endswith("_loss") and name not in NAMES}
        if state.num_input_tokens_seen and passed:
            values |= {"throughput": round(state.num_input_tokens_seen / passed, 2), "total_tokens": state.num_input_tokens_seen}
        line = {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            **values,
            "epoch": round(state.epoch or 0.0, 4),
            "percentage": round(100 * state.global_step / state.max_steps, 2) if state.max_steps > 0 else 100.0,
            "elapsed_time": str(timedelta(seconds=int(passed))),
            "remaining_time": str(timedelta(seconds=int(left))),
        }
        with (Path(str(args.output_dir)) / "trainer_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
