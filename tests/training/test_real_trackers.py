"""The trackers' own packages, kept from the network: a paused run goes on as the same run of theirs. Skipped where one is missing."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAUSED = """
import os, signal, sys
from finery.cli import main
from finery.training import kept

done = kept._Marks.on_step_end

def on_step_end(self, args, state, control, **more):
    done(self, args, state, control, **more)
    if state.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)

kept._Marks.on_step_end = on_step_end
raise SystemExit(main(sys.argv[1:]))
"""
"""`finery`, told to end in its second step."""


def rows(path: Path, query: str) -> list[Any]:
    with sqlite3.connect(path) as base:
        return base.execute(query).fetchall()


def of_mlflow(home: Path) -> list[tuple[str, list[int]]]:
    """Runs, and the steps that have a loss."""
    found = rows(home / "mlflow.db", "select run_uuid, step from metrics where key = 'loss' order by step")
    return [(run, [step for other, step in found if other == run]) for (run,) in rows(home / "mlflow.db", "select run_uuid from runs")]


def of_trackio(home: Path) -> list[tuple[str, list[int]]]:
    (path,) = (home / "trackio").glob("*.db")
    found = [(run, json.loads(told)) for run, told in rows(path, "select run_name, metrics from metrics order by step")]
    losses = [(run, told["train/global_step"]) for run, told in found if "train/loss" in told]
    return [(run, [step for other, step in losses if other == run]) for run in dict.fromkeys(run for run, _ in losses)]


def of_wandb(home: Path) -> list[tuple[str, list[int]]]:
    """Two files of one run, which `wandb sync` joins; what they hold is wandb's own."""
    parts = [path.name.rpartition("-")[2] for path in sorted((home / "wandb").glob("offline-run-*"))]
    return [(name, [parts.count(name)]) for name in dict.fromkeys(parts)]


def of_swanlab(home: Path) -> list[tuple[str, list[int]]]:
    parts = [path.name.rpartition("-")[2] for path in sorted((home / "swanlog").glob("*run-*"))]
    return [(name, [parts.count(name)]) for name in dict.fromkeys(parts)]


LOOKS: dict[str, tuple[Callable[[Path], list[tuple[str, list[int]]]], list[int]]] = {
    "mlflow": (of_mlflow, [1, 2, 3, 4]),
    "trackio": (of_trackio, [1, 2, 3, 4]),
    "wandb": (of_wandb, [2]),
    "swanlab": (of_swanlab, [2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", LOOKS)
def test_a_paused_run_goes_on_as_the_same(tracker: str, keys: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    quiet = {"HOME": str(home), "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}", "TRACKIO_DIR": str(home / "trackio")}
    quiet |= {"WANDB_MODE": "offline", "WANDB_DIR": str(home), "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    quiet |= {"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": str(home / "swanlog"), "OMP_NUM_THREADS": "1"}
    words = [f"{key}={json.dumps(value)}" for key, value in keys(report_to=tracker, max_steps=4, output_dir=str(out)).items()]
    told = []
    for command in (["-c", PAUSED, "train"], ["-m", "finery", "train"]):
        done = subprocess.run(
            [sys.executable, *command, *words], env=os.environ | quiet, cwd=home, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0 and "the tracker" not in done.stderr, done.stderr[-3000:]
        assert ("ended after step 2 of 4" if not told else "going on with") in done.stderr
        told.append(json.loads((out / "trackers.json").read_text()))
    assert told[0] == told[1] and told[0].keys() == {tracker}
    look, wanted = LOOKS[tracker]
    assert look(home) == [(told[0][tracker], wanted)]
