"""The peer for runs side by side: LLaMA-Factory 0.9.5 in an environment of its own (see peer_rows.py for how to make it).

FINERY_PEER names its Python:

    FINERY_PEER=/somewhere/peer/bin/python python benchmarks/first_step.py
"""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

LOOP_BEGINS = "***** Running training *****"
FIRST_STEP = "'loss':"
"""What the peer prints when all rows are encoded and the model is loaded, and when its first step is done (`logging_steps: 1`)."""


def peer_python() -> Path | None:
    """The peer's Python, or None where FINERY_PEER names none: a benchmark then measures Finery alone."""
    path = Path(os.environ["FINERY_PEER"]).expanduser() if os.environ.get("FINERY_PEER") else None
    if path and not os.access(path, os.X_OK):
        raise SystemExit(f"FINERY_PEER should be the path of the Python that the peer is installed for, found {path}")
    return path


def peer_config(model: Path, dataset_dir: Path, dataset: str, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Keys of one LoRA step on a CPU, nothing saved; `changes` adds keys, or takes out those that are None."""
    keys: dict[str, Any] = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 8,
        "template": "chatml",
        "dataset": dataset,
        "dataset_dir": str(dataset_dir),
        "cutoff_len": 2048,
        "overwrite_cache": True,
        "preprocessing_num_workers": None,  # one process
        "output_dir": str(output_dir),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "learning_rate": 1.0e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    return {key: value for key, value in (keys | changes).items() if value is not None}


def as_fp32(model: Path, folder: Path) -> Path:
    """A folder whose model is the same but is loaded in fp32, as the peer loads weights in the format that their config names.

    On a processor without bf16 one step in bf16 takes longer than all else together, which a measure of the data's way is not about.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()  # the link, so that the model's own is not written over
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return folder


def peer_command(keys: dict[str, Any], folder: Path) -> list[str]:
    """Write the keys in `folder`; the command that trains with them. JSON is YAML, and the standard library writes it."""
    path = folder / "peer.yaml"
    path.write_text(json.dumps(keys, indent=1), encoding="utf-8")
    return [str(peer_python()), "-m", "llamafactory.cli", "train", str(path)]


def seconds_until(command: list[str], markers: tuple[str, ...], log: Path, **environment: str) -> list[float]:
    """Seconds from the command to the first line with each marker, and to its end; what it prints goes to `log`.

    One thread, unless OMP_NUM_THREADS says otherwise: beside any other busy process a step with two can take ten times as long.
    """
    settings = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment}
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    seen: dict[str, float] = {}
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(command, env=settings, **pipe) as run:
        for line in run.stdout or ():
            file.write(line)
            for marker in markers:
                if marker in line:
                    seen.setdefault(marker, time.perf_counter() - began)
    missing = [marker for marker in markers if marker not in seen]
    if run.returncode or missing:
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}, not printed: {missing}; see {log}")
    return [*(seen[marker] for marker in markers), time.perf_counter() - began]


def first_step(model: Path, data: Path, folder: Path, **changes: Any) -> float:
    """Seconds from the command to the end of the first step on the alpaca rows in `data`, nothing cached; `folder` is for its files."""
    entries = {"rows": {"file_name": str(data.resolve())}}
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    keys = peer_config(as_fp32(model, folder / "model"), folder, "rows", folder / "out", cutoff_len=512, **changes)
    cache = str(folder / "cache")
    return seconds_until(peer_command(keys, folder), (FIRST_STEP,), folder / "log.txt", HF_DATASETS_CACHE=cache)[0]


if __name__ == "__main__":
    print(__doc__)
