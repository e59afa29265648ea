"""A trace of two steps, for whoever wants to see where the time goes: profile/trace.json and profile/operations.txt."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.log import get_logger
from finery.options import OptionGroup
from finery.training.callbacks.base import Callback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["Profile"]

log = get_logger(__name__)

FIRST, STEPS = 2, 2
"""The first step sets much up: the trace begins with the second, and holds two."""


class Profile(Callback):
    """Runs torch's profiler over the second and third step of a session."""

    class Options(OptionGroup):
        profile: bool = False
        """Write a trace of the second and third step (for chrome://tracing or Perfetto) and a table of operations."""

    profiler: Any = None
    done = 0

    @classmethod
    def wanted(cls, options: Any) -> bool:
        """`profile: true`."""
        return options.profile

    def on_step_begin(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Start before the second step."""
        self.done += 1
        if self.done == FIRST and state.is_world_process_zero:
            from torch._C._profiler import _ExperimentalConfig
            from torch.profiler import profile

            self.profiler = profile(experimental_config=_ExperimentalConfig(profile_all_threads=True))
            self.profiler.start()

    def on_step_end(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Write after the third."""
        if self.done == FIRST + STEPS - 1:
            self._write(Path(str(args.output_dir)) / "profile")

    def on_train_end(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """A run that ends before the third step leaves what it has."""
        self._write(Path(str(args.output_dir)) / "profile")

    def _write(self, folder: Path) -> None:
        if self.profiler is None:
            return
        self.profiler.stop()
        folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(folder / "trace.json"))
        table = self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60)
        (folder / "operations.txt").write_text(table, encoding="utf-8")
        self.profiler = None
        log.info("a trace of two steps is in %s", folder)
