"""Dice: every library's are restored to the bit, in every process; what an evaluation draws changes no step."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.style  # noqa: F401  # draws from Python's dice when it is imported: here, and not in the middle of the first run
import torch

from finery.errors import Stopped
from finery.training.dice import random_states, restore_random_states, undisturbed_dice
from finery.training.state_files import Unsavable, load_state, save_state
from finery.training.trainer import Trainer
from survived import Stage, weights

Keys = Callable[..., dict[str, Any]]


def draw() -> list[float]:
    """What each library's dice give next; normal ones keep a second number for the next time."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(())), float(torch.randn(()))]


def throw(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """In every step and every batch of an evaluation, all dice are drawn from; what steps got."""
    got: list[list[float]] = []
    train, heed = Trainer.training_step, Trainer.heed

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        got.append(draw())
        return train(self, *args, **kwargs)

    def heed_and_draw(self: Trainer) -> None:
        draw()
        heed(self)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(Trainer, "heed", heed_and_draw)
    return got


def test_neither_an_evaluation_nor_a_pause_moves_any_dice(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with dropout; the run with evaluations is also paused, and goes on with other dice in its hands."""
    got, given = throw(monkeypatch), {"lora_dropout": 0.3, "save_steps": 50}
    plain = stage.train(output_dir=str(stage.tmp_path / "plain"), **given)
    alone = got.copy()
    got.clear()
    given |= {"eval_dataset": "sums", "eval_strategy": "steps", "eval_steps": 1, "output_dir": str(stage.tmp_path / "evaluated")}
    stage.planned = {3: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(Stopped):
        stage.train(**given)
    for _ in range(3):
        draw()
    evaluated = stage.train(**given)
    assert len(alone) == 6 and got == alone
    assert weights(evaluated) == weights(plain)


def test_dice_are_restored_from_files_to_the_bit(tmp_path: Path) -> None:
    """Each library's, also in the middle of a pair of normal numbers, and where others were drawn meanwhile."""
    with undisturbed_dice():
        for library in (random.seed, np.random.seed, torch.manual_seed):
            library(11)
        draw()
        before = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        assert before["python"][2] is not None and before["numpy"][3] == 1, "a number is kept for the next time"  # type: ignore[index]
        save_state(tmp_path, "rank_0", {"dice": random_states()})
        wanted = [draw() for _ in range(400)]  # beyond what a state holds ready
        for library in (random.seed, np.random.seed, torch.manual_seed):
            library(12)
        restore_random_states(load_state(tmp_path, "rank_0")["dice"])
        assert random.getstate() == before["python"]
        assert all(np.array_equal(one, other) for one, other in zip(np.random.get_state(), before["numpy"], strict=True))
        assert torch.equal(torch.get_rng_state(), before["torch"])  # type: ignore[arg-type]
        assert [draw() for _ in range(400)] == wanted


def test_dice_are_as_they_were_found_also_after_an_error() -> None:
    with undisturbed_dice():
        wanted = [draw() for _ in range(3)]
    with pytest.raises(KeyError), undisturbed_dice():
        draw()
        raise KeyError
    with undisturbed_dice():
        assert [draw() for _ in range(3)] == wanted


def test_states_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Keys that are no texts, tensors of any format and shape, views, numbers that JSON has no word for, numpy's own."""
    wide = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "bf16": wide.bfloat16(),
        "view": wide.t()[1:],
        "none": torch.empty(0, 3),
        "one": torch.tensor(7),
        "yes": torch.tensor([True]),
    }
    plain = {"step": 3, "rate": 0.1 + 0.2, "high": float("inf"), "word": "\u4f60", "no": None, "on": False, "list": [1, [2.5, "x"]]}
    save_state(tmp_path, "some", {"state": {0: tensors, 1: {"exp": np.float64(1e-300)}}, "plain": plain, "pair": (1, 2), "n": np.int64(5)})
    found = load_state(tmp_path, "some")
    assert found["plain"] == plain and found["pair"] == [1, 2] and found["n"] == 5 and found["state"][1]["exp"] == 1e-300
    assert found["state"].keys() == {0, 1} and found["state"][0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = found["state"][0][name]
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
    with pytest.raises(Unsavable, match="the state of the other cannot be saved without pickle"):
        save_state(tmp_path, "other", {"thing": object()})


def in_two_processes(given: dict[str, Any]) -> str:
    words = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    environment = os.environ | {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "finery", "train", *words], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_two_processes_go_on_with_the_dice_of_each(keys: Keys, tmp_path: Path) -> None:
    """The two draw different numbers for dropout, since their rows are of different lengths."""
    given = keys(save_strategy="steps", save_steps=2, max_steps=4, per_device_train_batch_size=2, lora_dropout=0.3)
    whole, out = tmp_path / "whole", tmp_path / "out"
    in_two_processes(given | {"output_dir": str(whole)})
    states = [load_state(whole / "checkpoint-2", f"rank_{rank}")["dice"]["torch"] for rank in range(2)]
    assert not torch.equal(*states)
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-4")
    for name in ("manifest.json", "adapter_model.safetensors"):  # as if it had been killed between the two checkpoints
        (out / name).unlink()
    assert f"going on with {out / 'checkpoint-2'}" in in_two_processes(given | {"output_dir": str(out)})
    assert weights(out) == weights(whole)
    for name in ("optimizer.safetensors", "rank_0.safetensors", "rank_1.safetensors"):
        assert (out / "checkpoint-4" / name).read_bytes() == (whole / "checkpoint-4" / name).read_bytes(), name
