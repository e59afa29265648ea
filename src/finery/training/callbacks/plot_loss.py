"""Pictures of the loss: training_loss.png and one more for each evaluated measure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.options import OptionGroup
from finery.training.callbacks.base import Callback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["PlotLoss"]


class PlotLoss(Callback):
    """Draws the measures that the method names, smoothed and raw, when training ends."""

    class Options(OptionGroup):
        plot_loss: bool = False
        """Draw the loss curve as training_loss.png in the output folder."""

    @classmethod
    def wanted(cls, options: Any) -> bool:
        """`plot_loss: true`."""
        return options.plot_loss

    def on_train_end(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        """Draw."""
        if state.is_world_process_zero:
            measured = (name for line in state.log_history for name in line if name.startswith("eval_"))
            names = dict.fromkeys([*self.plots, *(name for name in measured if name.endswith(("_loss", "_accuracy")))])
            for name in names:
                points = [(int(line["step"]), line[name]) for line in state.log_history if name in line]
                if points:
                    draw(Path(str(args.output_dir)) / f"training_{name.replace('/', '_')}.png", name, points)


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential moving average that weighs the past more the more values there are."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else weight * smoothed[-1] + (1 - weight) * value)
    return smoothed


def draw(path: Path, name: str, points: Sequence[tuple[int, float]]) -> None:
    """Write one picture of (step, value) points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, values = zip(*points, strict=True)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no display, no global state of pyplot
    axes = figure.add_subplot()
    axes.plot(steps, values, color="#9db8d9", linewidth=1.2, marker="o" if len(points) < 12 else "", label="measured")
    axes.plot(steps, smooth(values), color="#1f4e8c", linewidth=2.2, label="smoothed")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(name.replace("_", " "))
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
