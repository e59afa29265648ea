"""SIGKILL at random moments: the same command goes on, and what comes out is, to the byte, what an undisturbed run gives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kills import DEMANDED, PHASES

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "soak" / "kills.json"
PAGES = [ROOT / "docs" / name for name in ("reliability.md", "reliability_zh.md")]


def campaign(tmp_path: Path, *words: str, seconds: float) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "kills.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("seed", "cases"), [(1, ["lora", "full, packed"]), (2, ["lora, accumulation", "full, streaming"])], ids=["packed", "streaming"]
)
def test_killed_runs_end_as_if_nothing_had_been(
    seed: int, cases: list[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The short form: each phase at least once, in adapters and whole models, packed and not, streamed, accumulated."""
    found = campaign(tmp_path, "--kills", "6", "--seed", str(seed), "--cases", *cases, seconds=400)
    assert not found["faults"]
    assert found["kills"] >= 6 and found["runs_compared"] >= 2
    assert all(found["by_phase"].get(phase, 0) >= 1 for phase in DEMANDED)
    record_property("kills", json.dumps(found["by_phase"]))


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    """`make soak`. With FINERY_WRITE_FIGURES the result is written down."""
    from importlib.metadata import version

    found = campaign(tmp_path, "--kills", "200", seconds=5400)
    assert not found["faults"]
    assert found["kills"] >= 200 and all(found["by_phase"][phase] >= 5 for phase in DEMANDED)
    if os.environ.get("FINERY_WRITE_FIGURES"):
        import datetime

        versions = {name: version(name) for name in ("finery", "torch", "transformers", "peft")}
        made = {"command": "python tests/kills.py --kills 200", "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat()}
        FIGURES.write_text(json.dumps({**made, "versions": versions, **found}, indent=1) + "\n")


def test_the_pages_tell_what_was_counted() -> None:
    told = json.loads(FIGURES.read_text())
    assert not told["faults"] and told["kills"] >= 200
    assert all(told["by_phase"][phase] >= 5 for phase in DEMANDED)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert f"{told['kills']} " in text
        assert all(f"| {told['by_phase'].get(phase, 0)} |" in text for phase in PHASES)
        assert f"{told['runs_compared']} " in text and told["date"] in text
