"""Peak memory of a merge by the number of files of weights: `python benchmarks/merging.py [--shards 2,4,8,16] [--result FILE]`.

A random Llama in bf16 whose files hold three layers (some 100 MB) each, and a LoRA on all of its linear layers. It is merged layer by
layer, as `finery export` does, and whole in memory; each in a process of its own, whose highest resident memory is taken less what it had
before.
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

LAYERS_PER_SHARD = 3
SHARD_BYTES = 105_000_000

WORK = """
import resource, sys, time
from pathlib import Path
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
import peft
from finery.models.adapters.lora import LoRA
from finery.models.merging import merged
from finery.models.trained import Trained, load_trained

folder, out, way, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
found, adapter = Trained(folder, [folder / "adapter"], True), LoRA(LoRA.Options.model_validate({}))
tokenizer = AutoTokenizer.from_pretrained(str(folder))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
if way == "layers":
    merged(found, adapter, tokenizer, False, torch.bfloat16, torch.device("cpu")).save(out, size)
else:
    model = load_trained(found, adapter, tokenizer, False, torch.bfloat16, torch.device("cpu"))
    model.save_pretrained(str(out), max_shard_size=size)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("PEAK", (peak - before) * 1024, time.perf_counter() - began)
"""


def build(folder: Path, num_shards: int) -> None:
    """Model, tokenizer and adapter."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from conftest import build_tokenizer

    build_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=LAYERS_PER_SHARD * num_shards, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(str(folder), max_shard_size=SHARD_BYTES)
    adapter = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(str(folder / "adapter"))


def measure(folder: Path, way: str) -> tuple[float, float]:
    """Peak in MB above what the imports took, and seconds."""
    out = Path(tempfile.mkdtemp(dir=folder.parent))
    result = subprocess.run(
        [sys.executable, "-c", WORK, str(folder), str(out), way, str(SHARD_BYTES)], capture_output=True, text=True, check=False
    )
    shutil.rmtree(out)
    if result.returncode:
        raise SystemExit(result.stderr)
    line = next(line for line in result.stdout.splitlines() if line.startswith("PEAK"))
    peak, seconds = map(float, line.split()[1:])
    return peak / 1e6, seconds


def main() -> None:
    """Measure and print, smallest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="2,4,8,16", help="numbers of files")
    parser.add_argument("--result", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'files':>6} {'model MB':>9} {'adapter MB':>11} {'by layers MB':>13} {'in memory MB':>13}")
    for number in map(int, args.shards.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            subprocess.run([sys.executable, __file__, "--build", str(folder), str(number)], check=True)
            files = list(folder.glob("*.safetensors"))
            (layers, _), (whole, _) = measure(folder, "layers"), measure(folder, "memory")
            size = sum(path.stat().st_size for path in files) / 1e6
            own = (folder / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6
        rows.append(
            {
                "files": len(files),
                "model_mb": round(size),
                "adapter_mb": round(own),
                "by_layers_mb": round(layers),
                "in_memory_mb": round(whole),
            }
        )
        print(f"{len(files):>6} {size:>9.0f} {own:>11.0f} {layers:>13.0f} {whole:>13.0f}", flush=True)
    if args.result:
        versions = {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")} | {
            "python": platform.python_version()
        }
        told = {"command": f"python benchmarks/merging.py --shards {args.shards}", "versions": versions, "rows": rows}
        args.result.parent.mkdir(parents=True, exist_ok=True)
        args.result.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        build(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
