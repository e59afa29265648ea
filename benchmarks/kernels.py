"""What each kernel brings: `python benchmarks/kernels.py [--model FOLDER | --random] [--threads 2] [--rounds 2] [--result FILE]`.

The same rows are trained with everything on, with each kernel's key off, and with all off (rows padded, the model's own code and
peft), one after the other, `--rounds` times; the median of steps 2 to last and the highest memory are printed, as a part of that with
everything on. `--random` makes a model of 1.2 billion random weights, for a GPU that has no model at hand.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from made_rows import write
from results import save

from finery.compat import have
from finery.models.demo_model import demo_model
from finery.models.kernels import KERNELS

FOLDER = Path(tempfile.gettempdir()) / "finery-benchmarks" / "kernels"
OURS = [name for name in KERNELS.names() if KERNELS[name].Options().model_dump()[KERNELS[name].switch]]
SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    **{f"without {name}": {KERNELS[name].switch: False} for name in OURS},
    "one micro-batch at a time": {"micro_batches_at_once": 1},
    **({"all, and Liger": {"enable_liger_kernel": True}} if have("liger_kernel") else {}),
    "none": {KERNELS[name].switch: False for name in OURS},
    "none, recomputing": {KERNELS[name].switch: False for name in OURS} | {"gradient_checkpointing": True},
}


def random_model() -> Path:
    """A Llama of 16 layers of 2048, with the tokenizer that tests build."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch

    from conftest import build_model

    torch.set_default_dtype(torch.bfloat16)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    folder = FOLDER / "random"
    if not folder.exists():
        build_model(folder, **sizes, max_position_embeddings=8192, vocab_size=32064, tie_word_embeddings=False)
    return folder


def measure(model: Path, rows: Path, threads: int, keys: dict[str, Any]) -> tuple[list[float], float, dict[str, Any]]:
    """Tokens a second of each step but the first, the highest memory in MB (of the GPU, where there is one), and the run's results."""
    out = FOLDER / "out"
    shutil.rmtree(out, ignore_errors=True)
    given = {
        "model_name_or_path": model, "dataset": rows, "output_dir": out, "do_train": True, "template": "chatml", "cutoff_len": 1024,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "learning_rate": 1e-4, "skip_memory_metrics": True, **keys,
    }  # fmt: skip
    code = (
        "import json, resource, sys, torch, finery; finery.train(json.loads(sys.argv[1])); "
        "gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() / 1e6; "
        "print('MB', gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, json.dumps(given, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    results = json.loads((out / "train_results.json").read_text(encoding="utf-8"))
    return [line["tokens_per_second"] for line in log if "loss" in line][1:], float(done.stdout.split("MB")[1]), results


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = args.model or (random_model() if args.random else demo_model())
    rows = write(FOLDER, 2000)
    speeds: dict[str, list[float]] = {name: [] for name in args.settings}
    memory, told = dict.fromkeys(args.settings, 0.0), {}
    for _ in range(args.rounds):
        for name in args.settings:
            keys = SETTINGS[name] | {"per_device_train_batch_size": args.batch, "max_steps": args.steps}
            seen, peak, results = measure(model, rows, args.threads, keys)
            speeds[name] += seen
            memory[name] = max(memory[name], peak)
            print(f"  {name}: {statistics.median(seen):,.0f} tokens/s", flush=True)
            told[name] = {key: results[key] for key in ("train_loss", "train_mfu", "train_peak_tflops", "train_forward_share")}
    table = []
    base = statistics.median(speeds[args.settings[0]])
    for name in args.settings:
        speed, results = statistics.median(speeds[name]), told[name]
        table.append(
            {"setting": name, "tokens_per_second": round(speed, 1), "ratio": round(speed / base, 3), "peak_mb": round(memory[name])}
            | results
        )
        print(f"{name}: {speed:,.0f} tokens/s ({speed / base:.2f}), {memory[name]:,.0f} MB, loss {results['train_loss']:.4f}", flush=True)
    save(args.result, {"rows": table})


if __name__ == "__main__":
    main()
