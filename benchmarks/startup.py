"""How fast `finery` answers: help, version, a typo in a YAML file; medians of paired runs, and the same for a bare Python.

python benchmarks/startup.py [--runs 7]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TYPO = "model_name_or_path: org/model\nlora_rnak: 8\nlearnig_rate: 1e-4\n"


def seconds(command: list[str], expected: int) -> float:
    """Wall time of one command that ends with the `expected` exit code."""
    began = time.perf_counter()
    result = subprocess.run(command, capture_output=True, check=False)
    taken = time.perf_counter() - began
    if result.returncode != expected:
        raise SystemExit(f"{' '.join(command)} ended with {result.returncode}: {result.stderr.decode()}")
    return taken


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "typo.yaml"
        path.write_text(TYPO, encoding="utf-8")
        finery = [sys.executable, "-m", "finery"]
        commands = {
            "python -c pass": ([sys.executable, "-c", "pass"], 0),
            "finery --help": ([*finery, "--help"], 0),
            "finery version": ([*finery, "version"], 0),
            "a typo in a YAML file": ([*finery, "train", str(path)], 2),
            "import transformers' Trainer": ([sys.executable, "-c", "from transformers import Trainer"], 0),
        }
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs):  # round by round, so that a busy moment hits all alike
            for name, (command, expected) in commands.items():
                taken[name].append(seconds(command, expected))
    print(f"{'what':<32} {'median s':>9} {'fastest s':>10}")
    for name, times in taken.items():
        print(f"{name:<32} {statistics.median(times):>9.3f} {min(times):>10.3f}")


if __name__ == "__main__":
    main()
