"""Every example runs: on a tiny model, with the settings that it holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finery.cli import main
from finery.models.adapters import ADAPTERS
from finery.run import Run

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINED = sorted(EXAMPLES.glob("train_*/*.yaml"))
Keys = Callable[..., dict[str, Any]]


def name_of(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def test_there_is_one_for_each_method() -> None:
    told = {yaml.safe_load(path.read_text())["finetuning_type"] for path in TRAINED}
    assert told == set(ADAPTERS.names())


@pytest.mark.parametrize("path", TRAINED, ids=name_of)
def test_it_trains(path: Path, keys: Keys, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"model_name_or_path": tiny_model, "output_dir": tmp_path / "out", "max_steps": 1, "dataset_dir": "data", "max_samples": 12}
    words = [str(path), *(f"{key}={value}" for key, value in small.items())]
    settings = yaml.safe_load(path.read_text())
    if "adapter_name_or_path" in settings:
        adapters = []
        for name in ("first", "second"):
            given = keys(output_dir=str(tmp_path / name))
            assert main(["train", *(f"{key}={value}" for key, value in given.items())]) == 0
            adapters.append(given["output_dir"])
        words.append(f"adapter_name_or_path={','.join(adapters)}")
    assert main(["train", *words]) == 0
    assert (tmp_path / "out" / "train_results.json").exists()
    told = capsys.readouterr().err
    assert "no such key" not in told
    assert "does not use" not in told


def test_chat_and_merge(keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = keys(template="llama3")
    assert main(["train", *(f"{key}={value}" for key, value in given.items())]) == 0
    there = [f"model_name_or_path={given['model_name_or_path']}", f"adapter_name_or_path={given['output_dir']}"]
    assert main(["chat", str(EXAMPLES / "inference/llama3_lora_sft.yaml"), *there, "max_new_tokens=3", "--prompt", "Hi"]) == 0
    merged = tmp_path / "merged"
    assert main(["export", str(EXAMPLES / "merge_lora/llama3_lora_sft.yaml"), *there, f"export_dir={merged}"]) == 0
    assert (merged / "model.safetensors").exists()
    assert "does not use" not in capsys.readouterr().err


def test_the_guides_keys_are_all_there() -> None:
    """The keys of the well-known guide's file, each of them honoured."""
    asked = [
        "model_name_or_path",
        "stage",
        "do_train",
        "finetuning_type",
        "lora_target",
        "dataset",
        "template",
        "cutoff_len",
        "max_samples",
        "overwrite_cache",
        "preprocessing_num_workers",
        "output_dir",
        "logging_steps",
        "save_steps",
        "plot_loss",
        "overwrite_output_dir",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "num_train_epochs",
        "lr_scheduler_type",
        "warmup_ratio",
        "bf16",
        "ddp_timeout",
        "val_size",
        "per_device_eval_batch_size",
        "eval_strategy",
        "eval_steps",
    ]
    run = Run.read([str(EXAMPLES / "train_lora/llama3_lora_sft.yaml"), "dataset_dir=data"])
    assert set(asked) <= run.written.keys()
