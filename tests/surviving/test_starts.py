"""Where a run starts: in folders that hold other runs, beside newer checkpoints, with keys and data that are the same or not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import finery
from finery.errors import Stopped, UserError
from finery.training.starting import normal
from survived import HOLDER, SAVING, Stage, steps_of, weights


def unfinished(stage: Stage, out: Path, step: int = 3, **changes: Any) -> None:
    """A run that has been told to end after a step."""
    import os
    import signal

    stage.planned = {step: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(Stopped):
        stage.train(output_dir=str(out), **changes)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dataset": "sums,names"}, {"dataset": "names,sums"}),
        ({"dataset": "sums", "eval_dataset": "names"}, {"dataset": "names", "eval_dataset": "sums"}),
    ],
    ids=["order", "roles"],
)
def test_other_rows_are_another_run(before: dict[str, Any], after: dict[str, Any], stage: Stage) -> None:
    out = stage.tmp_path / "out"
    unfinished(stage, out, **before)
    told = stage.complaint(output_dir=str(out), **after)
    assert "was trained on something else: " in told and "which rows are in the train set (has changed)" in told


def test_fewer_rows_of_a_set_are_another_run(stage: Stage, data_dir: Path) -> None:
    data = Path(shutil.copytree(data_dir, stage.tmp_path / "data"))
    out = stage.tmp_path / "out"
    unfinished(stage, out, dataset_dir=str(data))
    entries = json.loads((data / "dataset_info.json").read_text())
    entries["sums"]["num_samples"] = 12
    (data / "dataset_info.json").write_text(json.dumps(entries))
    assert "which rows are in the train set (has changed)" in stage.complaint(output_dir=str(out), dataset_dir=str(data))


def test_data_and_model_may_lie_elsewhere(stage: Stage, data_dir: Path, tiny_model: Path, whole: Path) -> None:
    out = stage.tmp_path / "out"
    unfinished(stage, out)
    data, model = (Path(shutil.copytree(one, stage.tmp_path / f"copy {one.name}")) for one in (data_dir, tiny_model))
    moved = stage.tmp_path / "moved"
    out.rename(moved)
    stage.train(output_dir=str(moved), dataset_dir=str(data), model_name_or_path=str(model))
    assert weights(moved) == weights(whole)


def test_what_comes_to_the_same_is_the_same(stage: Stage, whole: Path) -> None:
    out = stage.tmp_path / "out"
    unfinished(stage, out)
    same = {"warmup_ratio": 0.0, "data_seed": 42, "packing": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    stage.train(output_dir=str(out), num_train_epochs=7, **same)
    assert weights(out) == weights(whole)
    assert normal({"lora_target": ["b", "a"]})["lora_target"] == ["a", "b"]


def test_checkpoints_of_the_course_that_is_left_are_set_aside(stage: Stage) -> None:
    """They are neither counted, nor gone on with, nor do they push out what the run saves from then on."""
    out = stage.train(output_dir=str(stage.tmp_path / "out"))
    named = {"resume_from_checkpoint": str(out / "checkpoint-2"), "save_total_limit": 2, "max_steps": 8}
    stage.train(output_dir=str(out), **named)
    assert steps_of(out) == [7, 8]
    assert sorted(path.name for path in out.glob("before-*")) == [f"before-checkpoint-{n}" for n in (3, 4, 5, 6)]
    assert "is beyond step 2, with which the run goes on: it is kept as before-checkpoint-6" in stage.said


def test_another_runs_results_are_not_written_over(stage: Stage, whole: Path) -> None:
    other = stage.train(output_dir=str(stage.tmp_path / "other"), seed=7)
    before = weights(other)
    named = {"resume_from_checkpoint": str(whole / "checkpoint-2"), "output_dir": str(other)}
    assert "holds a run already, and" in stage.complaint(**named)
    assert weights(other) == before
    stage.train(**named, overwrite_output_dir=True)
    assert weights(other) == weights(whole)


def test_models_alone_cannot_be_gone_on_with(stage: Stage) -> None:
    out = stage.train(save_only_model=True)
    (out / "manifest.json").unlink()
    (out / "adapter_model.safetensors").unlink()
    assert "hold no optimizer's state ('save_only_model')" in stage.complaint(save_only_model=True)


def test_a_run_that_stopped_early_is_done(stage: Stage) -> None:
    given = {"eval_dataset": "sums", "eval_strategy": "steps", "eval_steps": 1, "early_stopping_steps": 1, "learning_rate": 3.0}
    given |= {"finetuning_type": "full", "lr_scheduler_type": "constant"}
    out = stage.train(**given)
    told = json.loads((out / "manifest.json").read_text())
    assert told["steps"] < told["planned_steps"] == 6
    assert "is the end of a run of 6 steps" in stage.complaint(**given)
    assert json.loads((out / "manifest.json").read_text()) == told


def test_a_failed_proof_fails_again(stage: Stage) -> None:
    given = {"pure_bf16": True, "finetuning_type": "full", "learning_rate": 1e-12}
    for _ in range(2):
        assert "the run has changed nothing" in stage.complaint(**given)
    assert not (stage.tmp_path / "out" / "manifest.json").exists()


def test_lost_best_weights_are_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"eval_dataset": "sums", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 3.0}
    given |= {"finetuning_type": "full", "lr_scheduler_type": "constant"}
    out = stage.tmp_path / "out"
    stage.planned = {5: lambda: shutil.rmtree(out / "checkpoint-1")}
    unfinished(stage, out, 4, **given)
    shutil.rmtree(out / "checkpoint-1")
    stage.planned = {}
    stage.train(output_dir=str(out), **given)
    assert "the best weights, of step 1, could not be kept; these are those of step 6" in stage.said


def test_a_skipped_step_does_not_count_as_a_loss_of_0(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from finery.training.trainer import Trainer
    from survived import lines

    work = Trainer._forward_and_backward

    def spoilt(self: Trainer, *args: Any) -> Any:
        return work(self, *args) * (float("nan") if self.state.global_step == 2 else 1.0)

    monkeypatch.setattr(Trainer, "_forward_and_backward", spoilt)
    out = stage.train(on_nonfinite="skip")
    losses = [line["loss"] for line in lines(out) if "loss" in line]
    assert losses[2] == losses[1] and min(losses) > 5


def test_who_is_kept_out_of_a_folder_touches_nothing(stage: Stage) -> None:
    out = stage.tmp_path / "out"
    (out / ".checkpoint-9.part").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline()
            with pytest.raises(UserError, match="another run is at work"):
                finery.train(stage.keys(output_dir=str(out), **SAVING))
        finally:
            other.kill()
    assert (out / ".checkpoint-9.part").exists()
    stage.train(output_dir=str(out))
    assert not (out / ".checkpoint-9.part").exists()
    assert "checkpoint-9 was interrupted while it was written, and is removed" in stage.said
