"""What tests of surviving share: runs on the tiny model to which something happens at a step."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import finery
from finery.errors import UserError
from finery.training import checkpoints

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "logging_steps": 1}


HOLDER = """
import sys, time
from pathlib import Path
from finery.training.lock import Lock

Lock(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(600)
"""
"""A process that keeps a folder locked."""


@dataclass
class Stage:
    """Trains; at chosen steps, what was planned happens."""

    keys: Callable[..., dict[str, Any]]
    tmp_path: Path
    planned: dict[int, Callable[[], object]] = field(default_factory=dict)
    said: str = ""

    def train(self, **changes: Any) -> Path:
        """Train for real; what was said is kept."""
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                return finery.train(self.keys(**(SAVING | changes)))
        finally:
            self.said = told.getvalue()

    def complaint(self, **changes: Any) -> str:
        """The complaint that ends a run."""
        with pytest.raises(UserError) as told:
            self.train(**changes)
        return str(told.value)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def steps_of(folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return [one.step for one in checkpoints.listed(folder)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def fill(folder: Path, leave: int = 4096) -> None:
    """Take all room of a disk but a little."""
    free = os.statvfs(folder)
    with (folder / "filler").open("wb") as file:
        file.write(bytes(max(free.f_bavail * free.f_frsize - leave, 0)))
