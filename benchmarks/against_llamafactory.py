"""Training beside LLaMA-Factory 0.9.5: `python benchmarks/against_llamafactory.py [--pairs 3] [--threads 2]`.

`--data` names the folder of LLaMA-Factory's demo sets (alpaca_en_demo.json, alpaca_zh_demo.json). Both programs train
SmolLM2-135M-Instruct on the same rows in the same order with the same seed and the same keys, one after the other, several times;
medians and ratios are printed. The peer runs with the best of a grid that is printed (weights in fp32 or bf16, `bf16: true`,
activations recomputed or not). FINERY_PEER names its Python, see peer.py.

Tokens a second are those of all steps but the first, by the clock at which a step's loss is printed; memory is the highest resident
set of the process; the start is the time from the command to the line that says that steps begin.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer import LOOP_BEGINS, as_fp32, peer_config, peer_python
from results import save
from startup import seconds

from finery.models.demo_model import demo_model

FOLDER = Path(tempfile.gettempdir()) / "finery-benchmarks" / "against"
DATA = Path(os.environ.get("FINERY_SHARED") or Path(__file__).parents[2] / "shared") / "data"
"""Where the demo sets lie, unless `--data` says otherwise."""
CUTOFF = 4200
GRID: dict[str, dict[str, Any]] = {
    "fp32, recomputing": {"fp32": True},
    "fp32": {"fp32": True, "disable_gradient_checkpointing": True},
    "bf16 weights, recomputing": {},
    "bf16 weights": {"disable_gradient_checkpointing": True},
    "bf16: true, recomputing": {"bf16": True},
    "bf16: true": {"bf16": True, "disable_gradient_checkpointing": True},
}
"""What the peer is tried with; it keeps weights in the format that the model's config names."""
CASES: dict[str, dict[str, Any]] = {
    "LoRA, batch 1 x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "LoRA, batch 8 x 1": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "full, batch 1 x 8": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "finetuning_type": "full",
        "learning_rate": 1e-5,
    },
}


@dataclass
class Measured:
    """What one run showed."""

    tokens_per_second: float
    peak_mb: float
    start_seconds: float
    loss: float
    mfu: float = float("nan")  # share of the machine's matrix-product peak, which Finery tells


def demo_rows(data: Path) -> list[dict[str, Any]]:
    """Those of both demo sets."""
    return [row for name in ("alpaca_en_demo", "alpaca_zh_demo") for row in json.loads((data / f"{name}.json").read_text(encoding="utf-8"))]


def write_set(rows: list[dict[str, Any]]) -> None:
    """The data set `rows` in FOLDER, which both programs read."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (FOLDER / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")


def tokens_by_step(count: int, step: int) -> list[int]:
    """Tokens of each step, as both programs encode the rows."""
    from finery.data.formats.alpaca import Alpaca
    from finery.data.formats.base import Columns, Tags
    from finery.data.rows.base import RowOptions
    from finery.data.rows.chat import Chat
    from finery.data.template import TemplateOptions, load_template
    from finery.models.tokenizer import load_tokenizer

    template = load_template(TemplateOptions(template="chatml"), load_tokenizer(demo_model(), False))
    rows, form = Chat(template, RowOptions(cutoff_len=CUTOFF)), Alpaca(Columns(), Tags())
    records = json.loads((FOLDER / "rows.json").read_text(encoding="utf-8"))
    lengths = [sum(len(row.ids) for row in rows.encode(form.read(record)).rows) for record in records]
    return [sum(lengths[start : start + step]) for start in range(0, count, step)]


def run(command: list[str], begins: str, step: str, losses: Path, threads: int, tokens: list[int]) -> Measured:
    """One command, watched to its end."""
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    pinned = ["taskset", "-c", "0", *command] if threads == 1 else command
    (losses / "trainer_state.json").unlink(missing_ok=True)
    began, start, marks = time.perf_counter(), 0.0, []
    with (FOLDER / "log.txt").open("w", encoding="utf-8") as log:
        pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
        process = subprocess.Popen(pinned, env=settings, **pipe)
        for line in process.stdout or ():
            log.write(line)
            now = time.perf_counter() - began
            start = now if begins in line and not start else start
            marks += [now] if step in line else []
        _, status, usage = os.wait4(process.pid, 0)
    # the peer's full fine-tuning ends with an error in its model card, when all is trained and saved
    if len(marks) < len(tokens) or not (losses / "trainer_state.json").exists():
        raise SystemExit(f"{' '.join(command)} ended with {status} after {len(marks)} steps; see {FOLDER / 'log.txt'}")
    history = json.loads((losses / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    loss = statistics.mean(line["loss"] for line in history if "loss" in line)
    results = json.loads((losses / "train_results.json").read_text(encoding="utf-8"))
    speed = sum(tokens[1:]) / (marks[len(tokens) - 1] - marks[0])
    return Measured(speed, usage.ru_maxrss / 1024, start, loss, results.get("train_mfu", float("nan")))


def both(case: dict[str, Any], peer_how: dict[str, Any], threads: int, tokens: list[int], who: str) -> Measured:
    """One run of Finery or of the peer with the keys of a case."""
    keys = case | {"max_steps": len(tokens), "template": "chatml", "cutoff_len": CUTOFF, "disable_shuffling": True, "save_strategy": "no"}
    model = demo_model()
    if who == "finery":
        ours = peer_config(model, FOLDER, "rows", FOLDER / "finery", **keys)
        words = [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in ours.items()]
        return run([sys.executable, "-m", "finery", "train", *words], "steps begin", "step ", FOLDER / "finery", threads, tokens)
    how = dict(peer_how)
    if how.pop("fp32", False):
        model = as_fp32(model, FOLDER / "fp32")
    theirs = peer_config(model, FOLDER, "rows", FOLDER / "peer", **keys, **how)
    (FOLDER / "peer.yaml").write_text(json.dumps(theirs), encoding="utf-8")
    command = [str(peer_python()), "-m", "llamafactory.cli", "train", str(FOLDER / "peer.yaml")]
    return run(command, LOOP_BEGINS, "'loss':", FOLDER / "peer", threads, tokens)


def best_of_grid(case: dict[str, Any], threads: int, tokens: list[int]) -> dict[str, Any]:
    """The peer's fastest setting; every one is printed."""
    speeds = {}
    for name, how in GRID.items():
        speeds[name] = both(case, how, threads, tokens, "peer").tokens_per_second
        print(f"  peer, {name}: {speeds[name]:.0f} tokens/s", flush=True)
    return GRID[max(speeds, key=lambda name: speeds[name])]


def growth(threads: int, steps: int) -> dict[str, Any]:
    """Finery alone on the same rows, twice as many in each of half as many steps: seconds and memory of a step beside those of once."""
    once, twice = (
        both(CASES["LoRA, batch 1 x 8"] | {"gradient_accumulation_steps": rows}, {}, threads, tokens_by_step(steps * 16, rows), "finery")
        for rows in (8, 16)
    )
    row = {"case": "twice the tokens in a step", "threads": threads}
    row |= {"seconds": round(2 * once.tokens_per_second / twice.tokens_per_second, 3), "memory": round(twice.peak_mb / once.peak_mb, 3)}
    print(
        f"twice the tokens in a step, {threads} thread(s): {row['seconds']:.2f} times the time, {row['memory']:.2f} times the memory",
        flush=True,
    )
    return row


def import_seconds(python: str) -> float:
    """What importing the libraries that both programs train with takes by itself: the median of three."""
    return statistics.median(
        seconds([python, "-c", "import torch, transformers, peft; from transformers import Trainer"], 0) for _ in range(3)
    )


def in_pairs(case: dict[str, Any], how: dict[str, Any], threads: int, tokens: list[int], pairs: int) -> dict[str, list[Measured]]:
    """Runs of the peer, where there is one, and of Finery, in turns."""
    runs: dict[str, list[Measured]] = {"peer": [], "finery": []} if peer_python() else {"finery": []}
    for _ in range(pairs):
        for who, done in runs.items():
            done.append(both(case, how, threads, tokens, who))
            print(f"  {who}: {done[-1]}", flush=True)
    return runs


def compare(name: str, case: dict[str, Any], pairs: int, threads: int, steps: int) -> dict[str, Any]:
    """One row of the table."""
    tokens = tokens_by_step(steps * 8, 8)
    print(f"{name}, {threads} thread(s), {steps} steps of 8 rows, {sum(tokens):,} tokens", flush=True)
    how = best_of_grid(case, threads, tokens[:2])
    runs = in_pairs(case, how, threads, tokens, pairs)
    row: dict[str, Any] = {"case": name, "threads": threads, "peer setting": next(key for key, value in GRID.items() if value == how)}
    for field, better in (("tokens_per_second", 1), ("peak_mb", -1), ("start_seconds", -1), ("loss", 0)):
        theirs, ours = (statistics.median(getattr(one, field) for one in runs[who]) for who in ("peer", "finery"))
        row[field] = {"peer": round(theirs, 4), "finery": round(ours, 4), "ratio": round(ours / theirs, 3)}
        print(f"  {field}: peer {theirs:.4g}, finery {ours:.4g}, ratio {ours / theirs:.2f}{'' if better else ' (should be 1)'}", flush=True)
    row["share of peak"] = round(statistics.median(one.mfu for one in runs["finery"]), 3)
    print(f"  share of the matrix-product peak: finery {row['share of peak']:.2f}", flush=True)
    return row


HEAD = (
    "| case | threads | the peer's best setting | tokens/s, peer | Finery | ratio | MB, peer | Finery | ratio |"
    " start, peer | Finery | ratio | mean loss, peer | Finery | of peak |"
)


def table_line(row: dict[str, Any]) -> str:
    """A row of the result as a line of a Markdown table, as docs/speed.md has it."""
    speed, memory, start, loss = (row[field] for field in ("tokens_per_second", "peak_mb", "start_seconds", "loss"))
    cells = [row["case"].replace(" x ", " × "), row["threads"], row["peer setting"]]
    cells += [f"{speed['peer']:.0f}", f"{speed['finery']:.0f}", f"{speed['ratio']:.2f}"]
    cells += [f"{memory['peer']:,.0f}", f"{memory['finery']:,.0f}", f"{memory['ratio']:.2f}"]
    cells += [f"{start['peer']:.1f} s", f"{start['finery']:.1f} s", f"{start['ratio']:.2f}"]
    cells += [f"{loss['peer']:.4f}", f"{loss['finery']:.4f}", f"{row['share of peak']:.0%}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--no-growth", action="store_true", help="leave out what twice the tokens cost")
    parser.add_argument("--result", type=Path, help="where to write the table as JSON")
    args = parser.parse_args()
    if peer_python() is None:
        raise SystemExit("FINERY_PEER should name the Python that LLaMA-Factory is installed for, see peer.py")
    write_set(random.Random(7).sample(demo_rows(args.data), args.steps * 16))
    imports = {who: round(import_seconds(str(python)), 2) for who, python in (("peer", peer_python()), ("finery", sys.executable))}
    print(f"imports alone: peer {imports['peer']} s, finery {imports['finery']} s", flush=True)
    found: dict[str, Any] = {"imports": imports, "rows": []}
    for threads in args.threads:
        for name in args.cases:
            found["rows"].append(compare(name, CASES[name], args.pairs, threads, args.steps))
            save(args.result, found)  # after each, since a whole table takes an hour
    print("\n".join([HEAD, *map(table_line, found["rows"])]))
    if not args.no_growth:
        found["rows"].append(growth(args.threads[0], args.steps))
        save(args.result, found)


if __name__ == "__main__":
    main()
