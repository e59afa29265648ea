"""What a run leaves in its folder: files that existing tools read, settings with their origins, a way to go on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from finery.commands.train import train
from finery.errors import UserError
from finery.reader import read_keys
from finery.run import Run

Keys = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything on, from a YAML file."""
    folder = tmp_path_factory.mktemp("finished")
    text = f"""\
model_name_or_path: {tiny_model}
do_train: true
dataset: sums,names
dataset_dir: {data_dir}
placeholders: {{name: Ada, author: "the testers"}}
cutoff_len: 128
val_size: 0.2
output_dir: {folder / "out"}
logging_steps: 2
save_steps: 3
plot_loss: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1e-3
num_train_epochs: 1
warmup_ratio: 0.1
lr_scheduler_type: cosine
bf16: false
eval_strategy: steps
eval_steps: 3
include_num_input_tokens_seen: true
hf_hub_token: secret-token
"""
    (folder / "run.yaml").write_text(text)
    train(Run.read([str(folder / "run.yaml"), "lora_rank=4"]))
    return folder / "out"


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def test_every_promised_file_is_there(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    promised = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    promised |= {"trainer_log.jsonl", "trainer_state.json", "train_results.json", "eval_results.json", "all_results.json"}
    promised |= {
        "training_loss.png",
        "training_eval_loss.png",
        "run.yaml",
        "README.md",
        "generation_config.json",
        "checkpoint-3",
        "checkpoint-6",
    }
    assert promised <= names


def test_nothing_is_pickled(finished: Path) -> None:
    assert not [path for path in finished.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_who_may_read_one_file_may_read_all(finished: Path) -> None:
    assert (
        len({path.stat().st_mode for folder in (finished, finished / "checkpoint-3") for path in folder.iterdir() if path.is_file()}) == 1
    )


def test_the_log_reads_as_the_reference_writes_it(finished: Path) -> None:
    lines = log_lines(finished)
    steps = 6  # 24 samples (a fifth of 30 is held out) in steps of 4
    assert [line["current_steps"] for line in lines if "loss" in line] == [2, 4, 6]
    always = {"current_steps", "total_steps", "epoch", "percentage", "elapsed_time", "remaining_time"}
    assert all(always <= line.keys() for line in lines)
    assert {line["total_steps"] for line in lines} == {steps}
    trained = [line for line in lines if "loss" in line]
    assert all({"lr", "throughput", "total_tokens"} <= line.keys() for line in trained)
    assert [line["percentage"] for line in trained] == [33.33, 66.67, 100.0]
    assert [line["current_steps"] for line in lines if "eval_loss" in line] == [3, 6]
    assert all(line["elapsed_time"].count(":") == 2 for line in lines)
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert "loss" not in lines[-1]


def test_results_are_the_union(finished: Path) -> None:
    parts = [json.loads((finished / f"{name}_results.json").read_text()) for name in ("train", "eval")]
    assert {"train_loss", "train_runtime", "epoch", "total_flos"} <= parts[0].keys()
    assert {"eval_loss", "eval_runtime"} <= parts[1].keys()
    assert json.loads((finished / "all_results.json").read_text()) == parts[0] | parts[1]


def test_the_state_is_hugging_faces(finished: Path) -> None:
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(finished / "trainer_state.json"))
    assert (state.global_step, state.max_steps, state.num_train_epochs) == (6, 6, 1)
    assert state.num_input_tokens_seen == log_lines(finished)[-1]["total_tokens"]


def test_pictures_are_pictures(finished: Path) -> None:
    import matplotlib.image

    for name in ("training_loss.png", "training_eval_loss.png"):
        picture = matplotlib.image.imread(finished / name)
        assert picture.shape[:2] == (540, 960)
        assert picture[..., :3].std() > 0.01, "an empty picture"


def test_settings_tell_their_origin(finished: Path) -> None:
    text = (finished / "run.yaml").read_text()
    lines = {line.partition(":")[0]: line for line in text.splitlines() if not line.startswith("#")}
    assert lines["learning_rate"].endswith("run.yaml:14")
    assert lines["lora_rank"].endswith("4  # command line")
    assert lines["seed"].endswith("42  # default")
    assert lines["lora_alpha"].endswith("8  # decided: twice lora_rank")
    assert "secret-token" not in text
    assert "# hf_hub_token: given, not written down" in text


def test_settings_train_the_same_run_again(finished: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((finished / "run.yaml").read_text())
    assert settings["gradient_accumulation_steps"] == 2
    assert {key: entry.value for key, entry in read_keys([str(finished / "run.yaml")], []).items()}.keys() == settings.keys()
    again = train(Run.read([str(finished / "run.yaml"), f"output_dir={tmp_path / 'again'}"]))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (finished, again))
    assert first.keys() == second.keys()
    assert all(bool((first[name] == second[name]).all()) for name in first)


def test_the_card_says_what_was_trained(finished: Path) -> None:
    front, _, text = (finished / "README.md").read_text().removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["tags"] == ["finery", "sft", "lora"]
    assert "- sums\n- names" in text
    assert "eval_loss" in text


def test_a_killed_run_goes_on_and_ends_the_same(finished: Path, tmp_path: Path) -> None:
    """The folder as it would be after a kill in step 4: one checkpoint, and a second that was never completed."""
    shutil.copytree(finished / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "checkpoint-9").mkdir()
    resumed = train(Run.read([str(finished / "run.yaml"), f"output_dir={tmp_path / 'out'}"]))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (finished, resumed))
    assert all(bool((first[name] == second[name]).all()) for name in first)
    assert [line["current_steps"] for line in log_lines(resumed) if "loss" in line] == [4, 6]


def test_resume_from_a_named_checkpoint(finished: Path, tmp_path: Path) -> None:
    words = [str(finished / "run.yaml"), f"output_dir={tmp_path / 'out'}", f"resume_from_checkpoint={finished / 'checkpoint-3'}"]
    resumed = train(Run.read(words))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (finished, resumed))
    assert all(bool((first[name] == second[name]).all()) for name in first)


def test_a_finished_folder_is_not_trained_over(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    given = keys(logging_steps=1)
    folder = train(Run.from_dict(given))
    before = log_lines(folder)
    with pytest.raises(UserError, match="overwrite_output_dir: true"):
        train(Run.from_dict(given))
    train(Run.from_dict(given | {"overwrite_output_dir": True}))
    assert len(log_lines(folder)) == len(before), "the old log was kept"


@pytest.mark.parametrize("resume", [True, "no/such/folder"])
def test_nothing_to_go_on_with(keys: Keys, resume: object) -> None:
    with pytest.raises(UserError, match="resume_from_checkpoint"):
        train(Run.from_dict(keys(resume_from_checkpoint=resume)))


def test_evaluation_alone(keys: Keys, finished: Path) -> None:
    given = keys(do_train=False, do_eval=True, val_size=6, adapter_name_or_path=str(finished))
    folder = train(Run.from_dict(given))
    assert json.loads((folder / "eval_results.json").read_text())["eval_loss"] > 0
    assert not (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_evaluation_alone_measures_what_the_run_left(keys: Keys, adapter: str) -> None:
    given = keys(val_size=6, learning_rate=0.05, finetuning_type=adapter)
    folder = train(Run.from_dict(given))
    measured = json.loads((folder / "eval_results.json").read_text())["eval_loss"]
    (folder / "eval_results.json").unlink()
    train(Run.from_dict(given | {"do_train": False, "do_eval": True}))
    assert json.loads((folder / "eval_results.json").read_text())["eval_loss"] == pytest.approx(measured, rel=1e-5)


def test_the_best_checkpoint_is_kept(keys: Keys) -> None:
    folder = train(
        Run.from_dict(
            keys(
                max_steps=4, val_size=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                load_best_model_at_end=True, learning_rate=5.0, save_total_limit=2,
            )
        )
    )  # fmt: skip
    state = json.loads((folder / "trainer_state.json").read_text())
    measured = {line["step"]: line["eval_loss"] for line in state["log_history"] if "eval_loss" in line and line["step"] < 4}
    assert state["best_metric"] <= min(measured.values())
    assert json.loads((folder / "eval_results.json").read_text())["eval_loss"] == pytest.approx(state["best_metric"])
