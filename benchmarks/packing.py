"""How long it takes to pack rows, and how full packs are: `python benchmarks/packing.py [--rows 1000000] [--cutoff-len 2048]`.

Lengths are drawn from a lognormal distribution like that of the demo rows (median 200 tokens). Beside it, the same rows are packed
in windows of a thousand, each by itself, as older tools do.
"""

import argparse
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from finery.data.packing import best_fit


def fill(lengths: NDArray[np.int32], packs: NDArray[np.int64], capacity: int) -> float:
    """Share of the packs' room that holds tokens."""
    return float(lengths.sum() / ((int(packs.max()) + 1) * capacity))


def in_windows(lengths: NDArray[np.int32], capacity: int, size: int = 1000) -> NDArray[np.int64]:
    """Packs of each window alone."""
    parts, begun = [], 0
    for start in range(0, len(lengths), size):
        part = best_fit(lengths[start : start + size], capacity) + begun
        begun = int(part.max()) + 1
        parts.append(part)
    return np.concatenate(parts)


def main() -> None:
    """Print seconds and fill, medians of five."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--cutoff-len", type=int, default=2048)
    args = parser.parse_args()
    dice = np.random.default_rng(0)
    lengths = np.clip(dice.lognormal(np.log(200), 0.9, args.rows), 1, args.cutoff_len).astype(np.int32)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        packs = best_fit(lengths, args.cutoff_len)
        seconds.append(time.perf_counter() - began)
    whole, windows = fill(lengths, packs, args.cutoff_len), fill(lengths, in_windows(lengths, args.cutoff_len), args.cutoff_len)
    print(f"{args.rows:,} rows in packs of {args.cutoff_len}: {statistics.median(seconds):.2f} s")
    print(f"fill {whole:.2%}; in windows of 1,000 rows {windows:.2%}")


if __name__ == "__main__":
    main()
