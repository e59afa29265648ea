"""QLoRA in 16, 8, 4, 3 and 2 bits on a real model: `python benchmarks/precision.py [--result FILE.json --plot FILE.png]`.

SmolLM2-135M-Instruct learns short rows of LLaMA-Factory's demo set (`--data` names its folder) with LoRA beside weights that each quantizer
holds in few bits; the held-out loss is measured before, on the way and after. Printed are both losses, what the frozen weights of the
linear layers take, the highest memory of the process, tokens a second, and what the tuned model answers.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from against_llamafactory import DATA
from results import save

from finery.models.demo_model import demo_model

FOLDER = Path(tempfile.gettempdir()) / "finery-benchmarks" / "precision"
SETTINGS: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "bnb, 8 bits": {"quantization_bit": 8},
    "torchao, 8 bits": {"quantization_bit": 8, "quantization_method": "torchao"},
    "bnb nf4, 4 bits": {"quantization_bit": 4},
    "hqq, 4 bits": {"quantization_bit": 4, "quantization_method": "hqq"},
    "hqq, 3 bits": {"quantization_bit": 3, "quantization_method": "hqq"},
    "hqq, 2 bits": {"quantization_bit": 2, "quantization_method": "hqq"},
}
ROWS, HELD_OUT, LONGEST = 240, 40, 500  # rows that are learnt and measured, characters of each
QUESTION = "What is the capital of France?"
HELD = re.compile(r"held in ([\d.]+) MB: ([\d.]+) bits each, ([\d.]+) expected")


def write_rows(data: Path) -> None:
    """The first short rows of the English demo set."""
    rows = json.loads((data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    short = [row for row in rows if sum(len(row[name]) for name in ("instruction", "input", "output")) < LONGEST]
    if len(short) < ROWS + HELD_OUT:
        raise SystemExit(f"{data} holds {len(short)} rows of fewer than {LONGEST} characters, {ROWS + HELD_OUT} are needed")
    FOLDER.mkdir(parents=True, exist_ok=True)
    sets = {"learnt": short[:ROWS], "held_out": short[ROWS : ROWS + HELD_OUT]}
    for name, part in sets.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    (FOLDER / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} for name in sets}), encoding="utf-8")


def config(name: str, steps: int) -> Path:
    """The file of one run."""
    keys = {
        "model_name_or_path": str(demo_model()),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "learnt",
        "eval_dataset": "held_out",
        "dataset_dir": str(FOLDER),
        "output_dir": str(FOLDER / re.sub(r"\W+", "-", name)),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 8,
        "learning_rate": 4e-4,
        "lr_scheduler_type": "cosine",
        "max_steps": steps,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": max(steps // 6, 1),
        "eval_on_start": True,
        "save_strategy": "no",
        "report_to": "none",
        **SETTINGS[name],
    }
    path = FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', name)}.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return path


def measure(name: str, steps: int, threads: int) -> dict[str, Any]:
    """One run and one answer."""
    path = config(name, steps)
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finery", "train", str(path)]
    with (FOLDER / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    said = (FOLDER / "log.txt").read_text(encoding="utf-8")
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}:\n{said[-2000:]}")
    folder = Path(json.loads(path.read_text(encoding="utf-8"))["output_dir"])
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    ask = [sys.executable, "-m", "finery", "chat", str(path), "--prompt", QUESTION, "do_sample=false", "max_new_tokens=24"]
    answer = subprocess.run(ask, env=settings, capture_output=True, text=True, check=True).stdout.strip()
    held = HELD.search(said)
    losses = [line["loss"] for line in history if "loss" in line]
    found = {
        "setting": name,
        "losses": [round(loss, 4) for loss in losses],
        "held out": [[line["step"], round(line["eval_loss"], 4)] for line in history if "eval_loss" in line],
        "frozen MB": float(held[1]) if held else round(2 * 106_168_320 / 1e6, 1),
        "bits each": float(held[2]) if held else 16.0,
        "bits expected": float(held[3]) if held else 16.0,
        "peak MB": round(usage.ru_maxrss / 1024),
        "tokens a second": round(statistics.median(line["tokens_per_second"] for line in history if "tokens_per_second" in line), 1),
        "answer": answer.splitlines()[-1] if answer else "",
    }
    last = losses[-6:]
    print(
        f"| {name} | {found['bits each']:.3g} | {found['frozen MB']:.0f} | {found['peak MB']:,} | {found['tokens a second']:.0f} "
        f"| {losses[0]:.2f} → {sum(last) / len(last):.2f} | {found['held out'][0][1]:.2f} → {found['held out'][-1][1]:.2f} "
        f"| {found['answer']} |",
        flush=True,
    )
    return found


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """The held-out losses of all runs in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for run in runs:
        steps, losses = zip(*run["held out"], strict=True)
        axes.plot(steps, losses, marker="o", markersize=3, label=run["setting"])
    axes.set(xlabel="optimizer steps", ylabel="held-out loss")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Print the table; write it and the picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--result", type=Path, help="where to write the runs as JSON")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    args = parser.parse_args()
    write_rows(args.data)
    print("| setting | bits a weight | MB of frozen weights | MB, highest | tokens/s | loss | held-out loss | answer |")
    runs: list[dict[str, Any]] = []
    for name in args.settings:
        runs.append(measure(name, args.steps, args.threads))
        save(args.result, {"question": QUESTION, "rows": ROWS, "held out": HELD_OUT, "runs": runs})
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
