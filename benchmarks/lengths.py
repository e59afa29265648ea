"""Tokens a second over lengths of rows, beside LLaMA-Factory 0.9.5: `python benchmarks/lengths.py [--result FILE.json --plot FILE.png]`.

LoRA on SmolLM2-135M-Instruct as in against_llamafactory.py; all rows of a run have about the same length, from 128 to 4,096 tokens, and a
step holds 4,096 tokens, one row a micro-batch for the peer. FINERY_PEER names the peer's Python, see peer.py; without it Finery runs alone.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from against_llamafactory import CASES, DATA, GRID, demo_rows, in_pairs, tokens_by_step, write_set
from results import save

from finery.models.demo_model import demo_model
from finery.models.tokenizer import load_tokenizer

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TOKENS = 4096  # of a step
STEPS = 3
PROMPT = 40  # about what the template and the question take


def write_rows(data: Path, length: int, count: int) -> None:
    """Rows whose answers are pieces of the demo sets' answers, one after the other."""
    tokenizer = load_tokenizer(demo_model(), False)
    ids = tokenizer("\n".join(row["output"] for row in demo_rows(data)), verbose=False)["input_ids"]
    size = length - PROMPT
    texts = [tokenizer.decode(ids[start % (len(ids) - size) :][:size]) for start in range(0, count * size, size)]
    write_set([{"instruction": f"Go on with text number {place}.", "input": "", "output": text} for place, text in enumerate(texts)])


def measure(data: Path, length: int, setting: str, threads: int, pairs: int) -> dict[str, Any]:
    """One point of both curves."""
    rows = TOKENS // length
    write_rows(data, length, rows * STEPS)
    tokens = tokens_by_step(rows * STEPS, rows)
    case = CASES["LoRA, batch 1 x 8"] | {"gradient_accumulation_steps": rows}
    runs = in_pairs(case, GRID[setting], threads, tokens, pairs)
    point: dict[str, Any] = {"length": sum(tokens) // (rows * STEPS)}
    for who, done in runs.items():
        point[who] = round(statistics.median(one.tokens_per_second for one in done), 1)
        point[f"{who} MB"] = round(statistics.median(one.peak_mb for one in done))
    print(point, flush=True)
    return point


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Both curves in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for who, label in (("finery", "Finery"), ("peer", "LLaMA-Factory 0.9.5")):
        if who in points[0]:
            axes.plot([point["length"] for point in points], [point[who] for point in points], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([point["length"] for point in points], [str(point["length"]) for point in points])
    axes.set(xlabel="tokens of a row", ylabel="tokens a second", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Print the points; write them and the picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--setting", choices=list(GRID), default="bf16 weights", help="how the peer runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--result", type=Path, help="where to write the points as JSON")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    args = parser.parse_args()
    points = [measure(args.data, length, args.setting, args.threads, args.pairs) for length in LENGTHS]
    save(args.result, {"peer setting": args.setting, "points": points})
    if args.plot:
        plot(points, args.plot)


if __name__ == "__main__":
    main()
