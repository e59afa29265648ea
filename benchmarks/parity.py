"""Losses of 50 steps beside those of the plain path in fp32: `python benchmarks/parity.py [--steps 50] [--rows 8]`.

LoRA of rank 8 on SmolLM2-135M-Instruct, `--rows` short rows of a demo set a step. The plain path is the model's own code, every kernel
switched off, rows padded; it is compared with all kernels in fp32 and in bf16, and with itself in bf16, which tells what the format of
the numbers alone changes. Printed is the largest relative difference of a step's loss.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from against_llamafactory import DATA, FOLDER, write_set
from peer import peer_config
from results import save

import finery
from finery.models.demo_model import demo_model
from finery.models.kernels import KERNELS

LIMITS = {"fp32": 1e-5, "bf16": 2e-2, "plain_bf16": 2e-2}
PLAIN: dict[str, Any] = {"micro_batches_at_once": 1, **{KERNELS[name].switch: False for name in KERNELS.names()}}
RUNS: dict[str, dict[str, Any]] = {"fp32": {"bf16": False}, "bf16": {"bf16": True}, "plain_bf16": {"bf16": True, **PLAIN}}


def losses(steps: int, rows: int, **changes: Any) -> list[float]:
    """The loss of each step of a run."""
    keys = {"per_device_train_batch_size": rows, "max_steps": steps, "cutoff_len": 256, **changes}
    folder = finery.train(peer_config(demo_model(), FOLDER, "rows", FOLDER / "parity", **keys))
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    """Print the differences; write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    rows = json.loads((args.data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    write_set(random.Random(3).choices([row for row in rows if len(row["output"]) < 400], k=args.steps * args.rows))
    plain = losses(args.steps, args.rows, bf16=False, **PLAIN)
    found: dict[str, Any] = {}
    for name, limit in LIMITS.items():
        ours = losses(args.steps, args.rows, **RUNS[name])
        apart = [abs(one - other) / other for one, other in zip(ours, plain, strict=True)]
        found[name] = {"largest": max(apart), "at_step": apart.index(max(apart)) + 1, "limit": limit}
        print(f"{name}: {max(apart):.1e} at step {found[name]['at_step']} of {args.steps} (goal {limit:.0e})", flush=True)
    save(args.result, {"steps": args.steps, "rows": args.rows} | found)


if __name__ == "__main__":
    main()
