"""Every form of export of the real model, and how near it is: `python benchmarks/exports.py [--only NAME,…] [--result FILE]`.

SmolLM2-135M-Instruct is tuned with LoRA for some steps on packaged data (and once as QLoRA), then exported by `finery export` in every form
that this machine has the packages for. The figures are those of each export's own parity.json; sizes are of the files that are written.
With `--only`, the other rows of an existing result file stay as they are.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finery.models.demo_model import demo_model

ROUTES: dict[str, dict[str, Any]] = {
    "safetensors float32": {"export_dtype": "float32"},
    "safetensors float16": {"export_dtype": "float16"},
    "safetensors bfloat16": {"export_dtype": "bfloat16"},
    "adapter": {"export_format": "adapter"},
    "gguf f32": {"export_format": "gguf", "export_gguf_type": "f32"},
    "gguf f16": {"export_format": "gguf", "export_gguf_type": "f16"},
    "gguf bf16": {"export_format": "gguf", "export_gguf_type": "bf16"},
    "gguf q8_0": {"export_format": "gguf", "export_gguf_type": "q8_0"},
    "bnb 8": {"export_format": "bnb", "export_quantization_bit": 8},
    "bnb 4": {"export_format": "bnb", "export_quantization_bit": 4},
    "torchao 8": {"export_format": "torchao", "export_quantization_bit": 8},
    "hqq 8": {"export_format": "hqq", "export_quantization_bit": 8},
    "hqq 4": {"export_format": "hqq", "export_quantization_bit": 4},
    "hqq 3": {"export_format": "hqq", "export_quantization_bit": 3},
    "hqq 2": {"export_format": "hqq", "export_quantization_bit": 2},
    "trained in nf4: float32": {"export_dtype": "float32", "quantization_bit": 4},
    "trained in nf4: bnb 4": {"export_format": "bnb", "export_quantization_bit": 4, "quantization_bit": 4},
}


def keys(folder: Path, bits: int | None) -> dict[str, Any]:
    """Of the training, which the export reads as well."""
    few = {"quantization_bit": bits} if bits else {}
    return few | {
        "model_name_or_path": str(demo_model()),
        "stage": "sft",
        "finetuning_type": "lora",
        "dataset": "identity,alpaca_en_demo",
        "output_dir": str(folder / f"trained-{bits or 16}"),
        "per_device_train_batch_size": 8,
        "learning_rate": 0.0005,
        "max_steps": 30,
        "cutoff_len": 512,
        "save_strategy": "no",
        "report_to": "none",
    }


def finery(command: str, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run a command of ours."""
    words = [sys.executable, "-m", "finery", command, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def row(scratch: Path, name: str) -> dict[str, Any]:
    """Export in one form; what its report says."""
    route = ROUTES[name]
    trained = keys(scratch, route.get("quantization_bit"))
    if not Path(trained["output_dir"]).exists():
        result = finery("train", trained | {"do_train": True})
        if result.returncode:
            raise SystemExit(result.stderr)
    target = scratch / "export"
    shutil.rmtree(target, ignore_errors=True)
    result = finery("export", trained | route | {"export_dir": str(target)})
    failed = target.with_name("export-failed")
    if not target.exists() and not failed.exists():
        return {"name": name, "error": result.stderr.strip().splitlines()[-1]}
    folder = target if target.exists() else failed
    report = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    kept = ("passed", "faults", "ids_equal", "num_probes", "effect", "texts")
    told = {"name": name, "weights_mb": round(size / 1e6, 1)} | {key: report[key] for key in kept}
    for key in ("distance", "exact", "moved", "as_trained"):
        if report[key]:
            told[key] = {figure: report[key][figure] for figure in ("mean_kl", "max_delta", "mean_delta", "same_next")}
    shutil.rmtree(folder)
    return told


def line(found: dict[str, Any]) -> str:
    """A row of the docs' table: name, megabytes, mean KL, largest difference of logits, same likeliest token, part of the effect."""
    if "error" in found or "distance" not in found:
        return f"| {found['name']} | not exported |"
    far, part = found["distance"], "" if found["effect"] is None else f"{found['effect']:.0%}"
    figures = f"{far['mean_kl']:.1e} | {far['max_delta']:.1e} | {far['same_next']:.1%} | {part}"
    return f"| {found['name']} | {found['weights_mb']:.0f} | {figures} |"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of rows, with commas between them")
    parser.add_argument("--result", type=Path, help="a JSON file for the figures")
    parser.add_argument("--page", action="store_true", help="print the rows of the docs' table from the result file, and no more")
    args = parser.parse_args()
    if args.page:
        print("\n".join(line(each) for each in json.loads(args.result.read_text(encoding="utf-8"))["rows"]))
        return
    names = args.only.split(",") if args.only else list(ROUTES)
    before = json.loads(args.result.read_text(encoding="utf-8"))["rows"] if args.result and args.result.exists() else []
    rows: dict[str, dict[str, Any]] = {each["name"]: each for each in before if each["name"] in ROUTES}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            rows[name] = found = row(Path(scratch), name)
            if "error" in found:
                print(f"{name:<26} {found['error']}", flush=True)
                continue
            figures = (
                f"KL {found['distance']['mean_kl']:.1e}  max {found['distance']['max_delta']:.1e}" if "distance" in found else "not loaded"
            )
            part = f"{found['effect']:.0%}" if found["effect"] is not None else "-"
            print(
                f"{name:<26} {found['weights_mb']:>7} MB  {figures}  effect {part}  {'passed' if found['passed'] else found['faults']}",
                flush=True,
            )
            if args.result:
                packages = ("torch", "transformers", "peft", "gguf", "bitsandbytes", "hqq", "torchao")
                versions = {package: version(package) for package in packages} | {"python": platform.python_version()}
                ordered = [rows[each] for each in ROUTES if each in rows]
                args.result.parent.mkdir(parents=True, exist_ok=True)
                told = {"command": "python benchmarks/exports.py", "versions": versions, "rows": ordered}
                args.result.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
