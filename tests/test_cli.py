"""The command line: verbs, overrides, files, exit codes; and the same from Python."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import finery
from finery.cli import main
from finery.commands import command_names
from finery.run import Run, not_yet

Keys = Callable[..., dict[str, Any]]


def words_of(given: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"finery {finery.__version__}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["help"], ["--help"], ["-h"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name} " in out for name in command_names())


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert f"finery {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["api", "webui", "webchat", "eval", "check", "show", "replay", "jobs"])
def test_a_later_command_says_so_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in command_names():
        assert name not in not_yet()["commands"]
        return
    assert main([name, "x.yaml"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: `finery {name}` is not built yet")
    assert told.err.count("\n") == 1


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["finery", "llamafactory-cli"])
def test_both_programs_are_installed(program: str) -> None:
    path = Path(sys.executable).with_name(program)
    result = subprocess.run([str(path), "version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"finery {finery.__version__}\n"


def test_env_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"- finery: {finery.__version__}\n" in out
    assert "- transformers: " in out
    assert "- Default data folder: " in out


def test_a_file_and_every_form_of_override(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model_name_or_path: a/b\nlearning_rate: 1e-4\nlora_rank: 4\neval_strategy: no\nlora_target: q_proj, v_proj\n")
    run = Run.read(
        [str(path), "lora_rank=16", "--cutoff-len", "64", "--max_steps=-1", "--bf16", "--lora_alpha", "8", "placeholders.name=Ada"]
    )
    assert run.loop.learning_rate == pytest.approx(1e-4)
    assert run.loop.eval_strategy == "no"
    assert run.adapter.options.lora_rank == 16
    assert run.adapter.options.lora_alpha == 8
    assert run.adapter.options.lora_target == ("q_proj", "v_proj")
    assert (run.rows.cutoff_len, run.loop.max_steps, run.loop.bf16) == (64, -1, True)
    assert run.data.placeholders == {"name": "Ada"}
    assert run.source("learning_rate") == f"{path}:2"
    assert run.source("lora_rank") == "command line"


def test_json_is_read_like_yaml(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n "model_name_or_path": "a/b",\n "lora_rank": 4\n}')
    run = Run.read([str(path)])
    assert run.adapter.options.lora_rank == 4
    assert run.source("lora_rank") == f"{path}:3"


def test_words_without_a_file() -> None:
    assert Run.read(["--model_name_or_path", "a/b", "--lora-rank", "2"]).adapter.options.lora_rank == 2
    assert Run.read(["model_name_or_path=a/b"]).adapter.options.lora_rank == 8


def test_interpolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK_OF_MINE", "32")
    path = tmp_path / "x.yaml"
    lines = ["model_name_or_path: a/b", "lora_rank: ${env:RANK_OF_MINE}", "lora_alpha: ${lora_rank}"]
    path.write_text("\n".join([*lines, "output_dir: saves/r${lora_rank}-${stage}", "stage: sft"]))
    run = Run.read([str(path)])
    assert (run.adapter.options.lora_rank, run.adapter.options.lora_alpha) == (32, 32)
    assert run.loop.output_dir == "saves/r32-sft"


def test_aliases_and_merge_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "base: &base {lora_rank: 4, seed: 7}\n<<: *base\nmodel_name_or_path: a/b\nseed: 8\n".replace("base: &base", "placeholders: &base")
    )
    run = Run.read([str(path)])
    assert (run.adapter.options.lora_rank, run.loop.seed) == (4, 8)
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 13))]
    path.write_text("\n".join(["model_name_or_path: a/b", *rows, "lora_rank: *a12"]))
    assert main(["train", str(path)]) == 2  # and soon: written out it would be 9 ** 13 words


def test_old_names_of_the_trainers_keys() -> None:
    run = Run.read(["model_name_or_path=a/b", "evaluation_strategy=steps", "val_size=2", "dataset=identity", "overwrite_output_dir=true"])
    assert run.loop.eval_strategy == "steps"
    assert run.loop.overwrite_output_dir


def test_unknown_keys_can_be_allowed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model_name_or_path=a/b", "lora_rnak=3"]) == 2
    assert "command line: no such key: 'lora_rnak'; did you mean 'lora_rank'?" in capsys.readouterr().err
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    Run.read(["model_name_or_path=a/b", "lora_rnak=3"])
    assert "ALLOW_EXTRA_ARGS" in capsys.readouterr().err


def test_keys_of_other_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    Run.read(["model_name_or_path=a/b", "freeze_trainable_modules=mlp"])
    assert "'freeze_trainable_modules' belongs to adapter 'freeze', which this run does not use" in capsys.readouterr().err


def test_training_needs_something_to_do(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words_of(keys(do_train=False))]) == 2
    assert "'do_train' should be true (or 'do_eval', or 'do_predict'): there is nothing to do" in capsys.readouterr().err


def test_what_only_training_needs_does_not_keep_one_from_chatting(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    """The training file on another machine: its data is not there, and two loop keys contradict each other."""
    given = keys(dataset="elsewhere", bf16=True, fp16=True)
    assert main(["chat", *words_of(given), "max_new_tokens=2", "--prompt", "Hi"]) == 0
    capsys.readouterr()
    assert main(["train", *words_of(given)]) == 2
    told = capsys.readouterr().err
    assert "elsewhere" in told
    assert "'fp16' and 'bf16' exclude each other" in told


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({"dataloader_prefetch_factor": 2}, "'dataloader_prefetch_factor' needs 'dataloader_num_workers'"),
        ({"dataloader_persistent_workers": True}, "'dataloader_persistent_workers' needs 'dataloader_num_workers'"),
        ({"report_to": "wandb, tensorboard"}, "'report_to' names 'wandb', which is not installed: pip install wandb"),
        ({"tf32": True}, "the trainer refuses these settings: --tf32 requires"),
    ],
)
def test_what_the_trainers_keys_need(keys: Keys, extra: dict[str, Any], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words_of(keys(**extra))]) == 2
    told = capsys.readouterr().err
    assert wanted in told
    assert "Traceback" not in told


def test_training_twice_from_python(keys: Keys, tmp_path: Path) -> None:
    """The function stays one after the package's own folders have been imported."""
    for name in ("one", "two"):
        assert (finery.train(keys(output_dir=str(tmp_path / name))) / "adapter_model.safetensors").exists()


def test_several_gpus_never_become_data_parallel(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import TrainingArguments

    from finery.models.precision import choose_precision
    from finery.training.arguments import training_arguments, visible_devices

    run = Run.from_dict(keys())
    precision = choose_precision(False, False, False, torch.device("cpu"), True)
    begin = TrainingArguments.__post_init__

    def with_four_gpus(self: TrainingArguments) -> None:
        begin(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_four_gpus)
    arguments = training_arguments(run.loop, run.trainer, precision, run.folder, recompute=False)
    assert arguments.n_gpu == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == 0


def test_a_second_gpu_means_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    from finery import launch

    monkeypatch.setattr(launch, "visible_devices", lambda: 4)
    assert launch.num_processes({}) == 4
    assert launch.num_processes({"LOCAL_RANK": "1"}) == 1
    told = launch.torchrun_words(["a b.yaml", "lora_rank=2"], {"NPROC_PER_NODE": "2"})
    ours = ["--nproc-per-node", "2", "--signals-to-handle", "SIGHUP,SIGQUIT"]
    assert told == [*ours, "--standalone", "-m", "finery", "train", "a b.yaml", "lora_rank=2"]
    several = launch.torchrun_words([], {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"})
    assert several[4:12] == ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "29501"]
    elastic = launch.torchrun_words([], {"RDZV_ID": "r", "MIN_NNODES": "1", "MAX_NNODES": "3", "MASTER_ADDR": "h"})
    assert elastic[4:10] == ["--nnodes", "1:3", "--rdzv-id", "r", "--rdzv-backend", "c10d"]
    monkeypatch.setattr(launch, "visible_devices", lambda: 1)
    assert not launch.needs_torchrun({})
    assert launch.needs_torchrun({"FORCE_TORCHRUN": "1"})


def test_the_settings_file_is_yaml(keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(keys()))
    assert main(["train", str(path)]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
