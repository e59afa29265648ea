"""Runs that are about to be killed: forked off with everything imported, or processes of their own; where they are, they tell."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import re
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

OWN = "anywhere in a process of its own"
PHASES = ("before the first step", "preprocessing", "inside a step", "after a step", "inside an evaluation", "inside a save",
          "at an epoch edge", "the final save", "after training", OWN)  # fmt: skip
CHUNK, SECONDS_A_ROW = 4, 0.004
"""Few rows at a time and slowly: else two dozen of them are encoded before anybody can kill."""


class Page:
    """A page of memory that a run and its killer share: phase, its changes, the step begun with, the last done, rows encoded."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 20)

    def clear(self, phase: str) -> None:
        """A run is about to start: nothing of the one before it may be taken for its own."""
        struct.pack_into("iiiii", self.memory, 0, PHASES.index(phase), 0, -1, -1, 0)

    def set(self, phase: str) -> None:
        _, count = struct.unpack_from("ii", self.memory)
        struct.pack_into("ii", self.memory, 0, PHASES.index(phase), count + 1)

    def get(self) -> tuple[str, int]:
        phase, count = struct.unpack_from("ii", self.memory)
        return PHASES[phase], count

    def tell(self, place: int, step: int) -> None:
        """Place 0: with how many steps done the loop begins; 1: how many are done."""
        struct.pack_into("i", self.memory, 8 + 4 * place, step)

    def steps(self) -> tuple[int, int]:
        """As `tell` told; -1 where the run did not come so far."""
        begun, done = struct.unpack_from("ii", self.memory, 8)
        return begun, done

    def add_rows(self, number: int) -> None:
        """So many are about to be encoded, by the one process that does so."""
        struct.pack_into("i", self.memory, 16, self.rows() + number)

    def rows(self) -> int:
        """How many the run has begun to encode."""
        return struct.unpack_from("i", self.memory, 16)[0]


def mark(page: Page, owner: Any, name: str, phase: str, then: str = "") -> None:
    """Have a function tell that it is at work, and then what was before it, or what comes `then`."""
    work: Callable[..., Any] = getattr(owner, name)

    @wraps(work)
    def told(*args: Any, **kwargs: Any) -> Any:
        before = then or page.get()[0]
        page.set(phase)
        found = work(*args, **kwargs)
        page.set(before)
        return found

    setattr(owner, name, told)


def before(owner: Any, name: str, tell: Callable[..., None]) -> None:
    """Have `tell` see what a function is called with, and then do its work."""
    work: Callable[..., Any] = getattr(owner, name)

    @wraps(work)
    def told(*args: Any, **kwargs: Any) -> Any:
        tell(*args, **kwargs)
        return work(*args, **kwargs)

    setattr(owner, name, told)


def mark_phases(page: Page) -> None:
    """Patch the trainer of this process."""
    from finery.data import encoder, load
    from finery.training import kept, trainer

    mark(page, load, "load_sets", "preprocessing")
    mark(page, trainer.Trainer, "training_step", "inside a step", "inside a step")  # until the optimizer has stepped
    mark(page, kept._Marks, "on_step_end", "after a step", "after a step")
    mark(page, trainer.Trainer, "evaluation_loop", "inside an evaluation")
    mark(page, kept.KeptTrainer, "_save_checkpoint", "inside a save")
    mark(page, kept._Marks, "on_epoch_end", "at an epoch edge", "at an epoch edge")
    mark(page, kept.KeptTrainer, "save_trained", "the final save", "after training")
    before(kept.KeptTrainer, "go_on", lambda self: page.tell(0, self.state.global_step))
    before(kept._Marks, "on_step_end", lambda self, args, state, control, **_: page.tell(1, state.global_step))
    encoder.CHUNK = CHUNK

    def slowly(self: Any, feed: Any, sources: Any, rows: Any) -> None:
        page.add_rows(len(rows))
        time.sleep(SECONDS_A_ROW * len(rows))

    before(encoder._Work, "_encode", slowly)


def forbid_dice_to_loaders() -> None:
    """Processes that load data draw nothing, so that there are no dice of theirs to keep: one that does ends the run with a fault."""
    import numpy as np
    import torch

    from finery.training import trainer

    flat = trainer._flat

    def told(units: Any) -> Any:
        found = flat(units)
        if torch.utils.data.get_worker_info() is not None:
            seed = torch.initial_seed()  # torch gives one to each of them
            assert random.getstate() == random.Random(seed).getstate(), "python's dice were thrown"
            _, _, position, *_ = np.random.get_state()
            assert position == 624, "numpy's dice were thrown"  # where it stands after a seed
            assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state()), "torch's dice were thrown"
        return found

    trainer._flat = told


def draw_everywhere() -> None:
    """Let what a step and an evaluation cost hang on a number from each dice there are."""
    import numpy as np
    import torch

    from finery.training import trainer

    measure = trainer.Trainer._measure

    def noisy(self: Any, model: Any, rows: Any) -> Any:
        loss = measure(self, model, rows)
        drawn = random.gauss(0, 1) + np.random.standard_normal() + float(torch.randn(()))  # the first two draw two and keep one
        return replace(loss, total=loss.total * (1 + 0.05 * drawn))

    trainer.Trainer._measure = noisy  # type: ignore[method-assign]


def start(keys: dict[str, Any], page: Page, log: Path, cache: Path, how: str = "") -> int:
    """Start a process that trains, and return its id: a fork, one that draws from all dice (`noisy`), or a command of its own (`own`)."""
    sys.stdout.flush()
    page.clear(OWN if how == "own" else PHASES[0])
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(place, 1)
        os.dup2(place, 2)
        os.environ["FINERY_CACHE"] = str(_own_cache(cache))
        words = ["train", *(f"{key}={json.dumps(value)}" for key, value in keys.items())]
        if how == "own":
            os.execv(sys.executable, [sys.executable, "-m", "finery", *words])
        mark_phases(page)
        forbid_dice_to_loaders()
        if how == "noisy":
            draw_everywhere()
        page.set(PHASES[0])
        from finery.cli import main

        status = main(words)
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def _own_cache(cache: Path) -> Path:
    """Rows are encoded anew for each run; kernels need not be compiled for each."""
    cache.mkdir(exist_ok=True)
    compiled = cache.parent / "compiled"
    compiled.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (cache / "native").symlink_to(compiled)
    return cache


def began_with(log: Path) -> int:
    """The step that a process of its own says it goes on with; -1 where it does not."""
    found = re.findall(r"going on with \S*checkpoint-(\d+)", log.read_text(encoding="utf-8", errors="replace"))
    return int(found[-1]) if found else -1


def newest_step(folder: Path) -> int:
    """That of the newest complete checkpoint; one that is about to be replaced by another of its step counts, since it is put back."""
    from finery.training import checkpoints

    replaced = [checkpoints.read(path) for path in folder.glob(checkpoints.REPLACED.format("checkpoint-*"))]
    found = [*checkpoints.listed(folder), *(one for one in replaced if one is not None)]
    return max((one.step for one in found), default=0)


def encoded_rows(cache: Path) -> tuple[int, int]:
    """How many rows a run's cache holds, and for how many there is a place."""
    import numpy as np

    from finery.data.store import ENTRY

    found = [np.fromfile(path, ENTRY)["present"] for path in (cache / "encoded").glob("*/index.bin")]
    return sum(int(one.sum()) for one in found), sum(len(one) for one in found)
