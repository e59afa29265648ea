"""SIGKILL at random moments: the same command goes on, and what comes out is, to the byte, what an undisturbed run gives."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kills import DEMANDED, left_over

ROOT = Path(__file__).parents[2]
FIGURES = "docs/soak/kills.json"


def campaign(result: str | Path, tmp_path: Path, *words: str, seconds: float) -> dict[str, Any]:
    """Run the command as people do, in the project's folder, and read what it wrote down."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "tests/kills.py", *words, "--result", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=ROOT, check=False)
    assert done.stdout, done.stderr[-3000:]
    found = json.loads((ROOT / result).read_text(encoding="utf-8"))
    assert not found["faults"]
    return found


@pytest.mark.parametrize(
    ("seed", "cases"),
    [(1, ["lora, all dice", "full, packed"]), (2, ["lora, accumulation", "full, streaming"])],
    ids=["packed", "streaming"],
)
def test_killed_runs_end_as_if_nothing_had_been(
    seed: int, cases: list[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The short form: each phase at least once, in adapters and whole models, packed and not, streamed, accumulated, with all dice."""
    found = campaign(tmp_path / "kills.json", tmp_path, "--kills", "6", "--seed", str(seed), "--cases", *cases, seconds=1200)
    assert found["kills"] >= 6 and found["runs_compared"] >= 2
    assert all(found["by_phase"].get(phase, 0) >= 1 for phase in DEMANDED)
    assert found["rows_left_preprocessing"]["least"] > 0
    record_property("kills", json.dumps(found["by_phase"]))


KILLED_WITH_A_LOCK = """
import json, os, signal, sys, time
from torch.utils.data import dataloader

begin = dataloader._MultiProcessingDataLoaderIter.__init__

def begun(self, loader):
    begin(self, loader)
    self._workers_done_event._cond.acquire()
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)

dataloader._MultiProcessingDataLoaderIter.__init__ = begun
import finery
finery.train(json.loads(sys.argv[1]))
"""
"""A run that is killed while it holds the lock that its loading process asks for."""


def test_a_loading_process_ends_with_its_run(keys: Callable[..., dict[str, Any]]) -> None:
    """Without more than torch does for that, it would wait for the lock for ever."""
    words = [sys.executable, "-c", KILLED_WITH_A_LOCK, json.dumps(keys(dataloader_num_workers=1, use_cpu=True))]
    with subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL) as run:
        assert run.wait(300) == -signal.SIGKILL
    left = left_over(run.pid, 30)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    """`make soak`. With FINERY_WRITE_FIGURES the result is what the pages tell of."""
    result = FIGURES if os.environ.get("FINERY_WRITE_FIGURES") else tmp_path / "kills.json"
    found = campaign(result, tmp_path, "--kills", "210", "--seed", "12", seconds=5400)
    assert found["kills"] >= 200 and all(found["by_phase"][phase] >= 5 for phase in DEMANDED)
