"""What `loss_ledger: true` costs: `python benchmarks/loss_ledger.py [--steps 160] [--tuning lora] [--result FILE.json]`.

One run of SmolLM2-135M-Instruct on the packaged demo rows, in one process. Every step is done twice on the same rows, with the ledger and
without, in turn first; what the ledger does after a step, and the part of it that goes to the disk, are counted with it. The median of
the ratios is told, of the clock (with its 95 % confidence interval) and of this process's time on the processor, on
which other programs have less influence; and, since both are noisy, which share of all steps' time is the ledger's own beside them.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from results import save

from finery.commands.train import train
from finery.data.rows.base import Row
from finery.models.demo_model import demo_model
from finery.run import Run
from finery.training import loss_ledger
from finery.training.session import Session
from finery.training.trainer import Trainer

WARM_UP = 3
"""Steps that are not counted."""
Seconds = tuple[float, float]
"""By the clock, and of the processor."""


class Pairs:
    """Does every step of a trainer twice."""

    def __init__(self, trainer: Trainer, watcher: Any) -> None:
        self.trainer = trainer
        self.watcher = watcher
        self.step = trainer.training_step
        self.found: list[tuple[Seconds, Seconds]] = []  # without and with
        self.own: list[float] = []  # seconds after each step that are the ledger's alone
        trainer.training_step = self.both

    def both(self, model: Any, rows: Sequence[Row], *rest: Any) -> Any:
        """One step, in turn first with and without; the gradients that stay are those of the last."""
        listen, share, spent = self.trainer.watch, None, {}
        for noted in (False, True) if len(self.found) % 2 else (True, False):
            model.zero_grad(set_to_none=True)
            self.trainer.watch = listen if noted else contextlib.nullcontext
            began = time.perf_counter(), time.process_time()
            share = self.step(model, rows, *rest)
            if noted:
                ended = time.perf_counter()
                self.watcher.on_step_end(self.trainer.args, self.trainer.state, self.trainer.control)
                if len(self.found) % 8 == 0:
                    self.watcher.ledger.flush()
                self.own.append(time.perf_counter() - ended)
            spent[noted] = time.perf_counter() - began[0], time.process_time() - began[1]
        self.trainer.watch = listen
        self.found.append((spent[False], spent[True]))
        return share


def measure(tuning: str, steps: int, batch: int) -> tuple[list[tuple[Seconds, Seconds]], list[float]]:
    """Seconds of each step, without and with, and those that are the ledger's alone."""
    pairs: list[Pairs] = []
    build = Session.build_trainer

    def built(session: Session, *args: Any, **kwargs: Any) -> Trainer:
        trainer = build(session, *args, **kwargs)
        watcher = next(one for one in session.watchers if hasattr(one, "ledger"))
        pairs.append(Pairs(trainer, watcher))
        return trainer

    with tempfile.TemporaryDirectory() as folder, patch.object(Session, "build_trainer", built):
        keys = {
            "model_name_or_path": str(demo_model()), "dataset": "alpaca_en_demo", "finetuning_type": tuning, "output_dir": f"{folder}/out",
            "max_steps": steps + WARM_UP, "per_device_train_batch_size": batch, "cutoff_len": 1024, "loss_ledger": True, "do_train": True,
            "save_strategy": "no", "report_to": "none", "learning_rate": 1e-5, "export_verify": False,
        }  # fmt: skip
        train(Run.from_dict(keys, trains=True))
        lines = loss_ledger.read_ledger(Path(folder) / "out" / loss_ledger.FOLDER).num_rows
    assert lines  # it has noted them
    return pairs[0].found[WARM_UP:], pairs[0].own[WARM_UP:]


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median, by order statistics (binomial, normal approximation): for any distribution."""
    ordered, count = sorted(ratios), len(ratios)
    aside = max(int(count / 2 - 0.98 * count**0.5), 0)
    return ordered[aside], ordered[count - 1 - aside]


def main() -> None:
    """Print the ratios; write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160, help="pairs that are counted")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    parser.add_argument("--result", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    found, own = measure(args.tuning, args.steps, args.batch)
    clock, processor = ([noted[which] / plain[which] for plain, noted in found] for which in (0, 1))
    seconds = statistics.median(plain[0] for plain, _ in found)
    share = sum(own) / sum(plain[0] for plain, _ in found)
    quarters = statistics.quantiles(clock, n=4)
    print(f"{args.tuning}, {args.batch} rows a step, {len(found)} pairs on {torch.get_num_threads()} threads: {seconds:.3f} s a step")
    least, most = interval(clock)
    print(f"with the ledger: {statistics.median(clock):.3f} (95 % confidence interval {least:.3f} to {most:.3f})")
    print(f"half of the ratios: {quarters[0]:.3f} to {quarters[2]:.3f}")
    print(f"of processor time:  {statistics.median(processor):.4f}")
    print(f"its own work after the steps: {share:.4%} of their time")
    figures = {
        "tuning": args.tuning,
        "rows_a_step": args.batch,
        "pairs": len(found),
        "seconds_a_step": round(seconds, 4),
        "ratio": round(statistics.median(clock), 3),
        "ratio_interval": [round(least, 3), round(most, 3)],
        "ratio_quarters": [round(quarters[0], 3), round(quarters[2], 3)],
        "processor_ratio": round(statistics.median(processor), 3),
        "own_share": round(share, 6),
    }
    save(args.result, figures)


if __name__ == "__main__":
    main()
