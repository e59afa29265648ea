"""Seconds from the command to the first optimizer step: `python benchmarks/first_step.py [--kinds jsonl] [--sizes ...] [--pairs 3]`.

For every kind of file each size is run in turn with the smallest one, on an empty cache and again on the cache that this
left; medians and ratios are printed. With FINERY_PEER naming the python of an environment that has LLaMA-Factory, the same
rows and model are given to it once (see peer.py), at the size that `--peer` names.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from made_rows import write

from finery.models.demo_model import demo_model

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # as the peer gets it, see peer.py
FOLDER = Path(tempfile.gettempdir()) / "finery-benchmarks"


def first_step(data: Path, cache: Path, out: Path) -> float:
    """Start a run, wait for the line of its first step, and for its end."""
    keys = {
        "model_name_or_path": demo_model(), "dataset": data, "output_dir": out, "overwrite_output_dir": "true", "do_train": "true",
        "max_steps": 1, "per_device_train_batch_size": 1, "logging_steps": 1, "save_strategy": "no", "cutoff_len": 512, "report_to": "none",
        "template": "chatml",
    }  # fmt: skip
    command = [sys.executable, "-m", "finery", "train", *(f"{key}={value}" for key, value in keys.items())]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | {"FINERY_CACHE": str(cache)})
    seconds, told = 0.0, []
    assert process.stderr is not None
    for line in process.stderr:
        told.append(line)
        if line.startswith("step 1/") and not seconds:
            seconds = time.perf_counter() - began
    if process.wait() or not seconds:
        raise SystemExit("".join(told))
    return seconds


def measure(kind: str, sizes: list[int], pairs: int) -> None:
    """Print a line for each size: first start, start on a filled cache, and both against the smallest size."""
    seconds: dict[tuple[int, str], list[float]] = {}
    for _ in range(pairs):
        for size in sizes:
            data = write(FOLDER, size, kind)
            cache, out = Path(tempfile.mkdtemp(dir=FOLDER)), Path(tempfile.mkdtemp(dir=FOLDER))
            for start in ("first", "again"):
                seconds.setdefault((size, start), []).append(first_step(data, cache, out))
            shutil.rmtree(cache)
            shutil.rmtree(out)
    for size in sizes:
        texts = []
        for start in ("first", "again"):
            each, base = seconds[size, start], seconds[sizes[0], start]
            ratio = statistics.median(a / b for a, b in zip(each, base, strict=True))
            texts.append(f"{start} start {statistics.median(each):6.2f} s, {ratio:.2f} x the smallest")
        print(f"{kind:8s} {size:>9,} rows: {'; '.join(texts)}", flush=True)


def measure_peer(size: int) -> None:
    """The same rows through the peer, once, and ours beside it."""
    from peer import first_step as peer_first_step

    data = write(FOLDER, size)
    theirs = peer_first_step(demo_model(), data, Path(tempfile.mkdtemp(dir=FOLDER)))
    ours = first_step(data, Path(tempfile.mkdtemp(dir=FOLDER)), Path(tempfile.mkdtemp(dir=FOLDER)))
    print(f"{size:,} rows: peer {theirs:.1f} s, ours {ours:.1f} s: {theirs / ours:.1f} x shorter")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default="jsonl,parquet,arrow")
    parser.add_argument("--sizes", default="2000,200000,2000000")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--peer", type=int, help="rows that the peer is given, too")
    args = parser.parse_args()
    for kind in args.kinds.split(",") if args.kinds else ():
        measure(kind, [int(size) for size in args.sizes.split(",")], args.pairs)
    if args.peer:
        measure_peer(args.peer)


if __name__ == "__main__":
    main()
