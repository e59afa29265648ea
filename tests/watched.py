"""Runs on the tiny model, with all that can be seen of them kept."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finery.commands.chat import answer
from finery.commands.export import export
from finery.commands.train import train
from finery.errors import UserError
from finery.run import Run
from finery.training.session import Session

QUESTION = [{"role": "user", "content": "What is 3 plus 4?"}]
GREEDY = {"do_sample": False, "max_new_tokens": 12}
"""Chat of a known length, the same every time."""


@dataclass
class Outcome:
    """What can be seen of a run: its folder, what it said, the trainer it used, or the complaint that ended it."""

    folder: Path
    said: str = ""
    complaint: str = ""
    trainer: Any = None

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "trainer_log.jsonl").read_text().splitlines()]

    def column(self, name: str) -> list[Any]:
        return [line[name] for line in self.log if name in line]

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def weights(self, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
        return load_file(self.folder / name)

    @property
    def adapter(self) -> dict[str, Any]:
        return json.loads((self.folder / "adapter_config.json").read_text())


_DONE: dict[str, Outcome] = {}
"""Runs by their changes, so that a baseline is shared."""


@dataclass
class Bench:
    """Makes runs on the tiny model, each with a folder of its own unless the case names one."""

    keys: Callable[..., dict[str, Any]]
    data_dir: Path
    tiny_model: Path
    tmp_path: Path
    patch: pytest.MonkeyPatch

    def train(self, **changes: Any) -> Outcome:
        """Train for real; a complaint is part of the outcome."""
        return self._watch(lambda run: train(run), changes, trains=True)

    def once(self, **changes: Any) -> Outcome:
        """The same, but taken from an earlier case that made the same run."""
        name = json.dumps(changes, sort_keys=True)
        if name not in _DONE:
            _DONE[name] = self.train(**changes)
        return _DONE[name]

    def export(self, **changes: Any) -> Outcome:
        """Export what `once()` has trained, or the base model."""
        return self._watch(lambda run: export(run), changes, trains=False)

    def chat(self, **changes: Any) -> str:
        """What the base model answers; the dice start at the same place every time."""
        torch.manual_seed(1)
        return answer(Run.from_dict(self.keys(**(GREEDY | changes))), QUESTION)

    def _watch(self, work: Callable[[Run], Path], changes: dict[str, Any], *, trains: bool) -> Outcome:
        number = len(list(self.tmp_path.glob("out*")))
        outcome = Outcome(Path(changes.get("output_dir") or self.tmp_path / f"out{number}"))
        build = Session.build_trainer

        def spy(*args: Any, **kwargs: Any) -> Any:
            outcome.trainer = build(*args, **kwargs)
            return outcome.trainer

        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            patch.setattr(Session, "build_trainer", spy)
            try:
                keys = self.keys(**({"output_dir": str(outcome.folder)} | changes))
                outcome.folder = work(Run.from_dict(keys, trains=trains))
            except UserError as error:
                outcome.complaint = str(error)
        outcome.said = said.getvalue()
        return outcome


@dataclass
class Case:
    """A key's other value, what to look at, and what is to be seen there with the default and with the other value.

    Where `wants` is left out, the two must differ. `base` holds keys that both runs need.
    """

    value: Any
    look: Callable[[Outcome], Any]
    wants: tuple[Any, Any] | None = None
    base: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------ what can be looked at


def losses(run: Outcome) -> list[float]:
    return run.column("loss")


def rates(run: Outcome) -> list[float]:
    return [round(rate, 8) for rate in run.column("lr")]


def steps(run: Outcome) -> int:
    return run.log[-1]["total_steps"]


def evaluated_at(run: Outcome) -> list[int]:
    return [line["current_steps"] for line in run.log if "eval_loss" in line]


def checkpoints(run: Outcome) -> list[str]:
    return sorted(name for name in run.files if name.startswith("checkpoint-"))


def adapter_sum(run: Outcome) -> float:
    return sum(float(tensor.double().abs().sum()) for tensor in run.weights().values())


def has(name: str) -> Callable[[Outcome], bool]:
    """Whether a file was written."""
    return lambda run: name in run.files


def says(text: str) -> Callable[[Outcome], bool]:
    """Whether a run said this, or ended with it."""
    return lambda run: text in run.said + run.complaint
