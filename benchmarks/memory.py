"""Peak memory of a run by the number of rows: `python benchmarks/memory.py [--sizes 200000,2000000] [--gigabytes 5] [--full]`.

A tiny random model is trained for a few steps on each size, so that what is seen is the data's share; with `--full` the
whole set is encoded and packed first. The figure is the highest sum over all processes of the run of their proportional
set size (memory shared by several counts once), looked at ten times a second, and the main process's own resident peak.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from made_rows import write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import build_model

FOLDER = Path(tempfile.gettempdir()) / "finery-benchmarks"


def peak(data: Path, full: bool, steps: int) -> tuple[float, float, float]:
    """Highest memory of all processes and resident memory of the first, in MB, and the seconds of the whole."""
    model = FOLDER / "tiny"
    if not model.exists():
        build_model(model)
    cache, out = Path(tempfile.mkdtemp(dir=FOLDER)), Path(tempfile.mkdtemp(dir=FOLDER))
    keys = {
        "model_name_or_path": model, "dataset": data, "output_dir": out, "overwrite_output_dir": "true", "do_train": "true",
        "max_steps": steps,
        "per_device_train_batch_size": 4, "save_strategy": "no", "cutoff_len": 512, "report_to": "none", "packing": str(full).lower(),
    }  # fmt: skip
    command = [sys.executable, "-m", "finery", "train", *(f"{key}={value}" for key, value in keys.items())]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"FINERY_CACHE": str(cache)})
    highest = own = 0.0
    while process.poll() is None:
        total, first = _memory(process.pid)
        highest, own = max(highest, total), max(own, first)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the run on {data} ended with {process.returncode}")
    shutil.rmtree(cache)
    shutil.rmtree(out)
    return highest, own, time.perf_counter() - began


def _memory(pid: int) -> tuple[float, float]:
    total = first = 0.0
    try:
        parent = psutil.Process(pid)
        for each in (parent, *parent.children(recursive=True)):
            info = each.memory_full_info()
            total += info.pss / 1e6
            first = first or info.rss / 1e6
    except psutil.Error:
        pass
    return total, first


def main() -> None:
    """Print a line for each size, and the last against the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="200000,2000000")
    parser.add_argument("--gigabytes", type=float, help="a file of this size as well")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.gigabytes:
        one = write(FOLDER, 20_000).stat().st_size / 20_000
        sizes.append(int(args.gigabytes * 1e9 / one))
    found = []
    for size in sizes:
        data = write(FOLDER, size)
        total, own, seconds = peak(data, args.full, args.steps)
        found.append(total)
        gigabytes = data.stat().st_size / 1e9
        told = f"all processes {total:,.0f} MB, the first {own:,.0f} MB; {seconds:.0f} s"
        print(f"{size:>9,} rows ({gigabytes:.2f} GB): {told}; {total / found[0]:.2f} x the smallest", flush=True)


if __name__ == "__main__":
    main()
