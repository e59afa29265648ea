"""The scripts that print the README's figures run: a change elsewhere may not leave them behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.real
@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("encoding.py", ["200", "1"], ["chatml: ", "ratio ", "own template: ", "a second start takes all 200 rows from the cache in "]),
        ("packing.py", ["--rows", "1000"], ["1,000 rows in packs of 2048: "]),
    ],
)
def test_a_script_prints_its_figures(script: str, words: list[str], said: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script, *words], cwd=BENCHMARKS, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [text for text in said if text not in done.stdout] == []
