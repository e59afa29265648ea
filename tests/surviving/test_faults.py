"""The catalogue of faults: disks, files, processes and clocks that go wrong under a run. None loses what was trained."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from finery.cli import main
from finery.training import checkpoints, kept
from survived import HOLDER, Stage, fill, lines, steps_of, weights

Keys = Callable[..., dict[str, Any]]


@pytest.mark.fault("full disk")
@pytest.mark.parametrize("estimated", [True, False], ids=["told before", "met while writing"])
def test_a_full_disk_costs_a_checkpoint_and_no_more(
    estimated: bool, stage: Stage, small_disk: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, tries again, and ends as if nothing had been."""
    if not estimated:
        monkeypatch.setattr(checkpoints, "MARGIN_BYTES", -(2**40))
    out = small_disk / "out"
    stage.planned = {3: lambda: fill(small_disk), 5: (small_disk / "filler").unlink}
    stage.train(output_dir=str(out))
    assert "the checkpoint of step 3 could not be written: " in stage.said
    assert ("it needs some" if estimated else "No space left") in stage.said
    assert steps_of(out) == [1, 2, 5, 6]
    assert weights(out) == weights(whole)
    assert not list(out.glob(".*.part"))


def test_a_missed_checkpoint_is_tried_again_soon(stage: Stage, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only when the next one is due."""
    monkeypatch.setattr(kept, "RETRY_SECONDS", 0.0)
    stage.planned = {2: lambda: fill(small_disk), 4: (small_disk / "filler").unlink}
    stage.train(output_dir=str(small_disk / "out"), save_steps=2, max_steps=7)
    assert steps_of(small_disk / "out") == [4, 6, 7]
    stage.planned = {3: lambda: fill(small_disk), 5: (small_disk / "filler").unlink}
    stage.train(output_dir=str(small_disk / "other"), save_steps=3, max_steps=7)
    assert steps_of(small_disk / "other") == [5, 6, 7]


@pytest.mark.fault("full disk at the end")
def test_trained_weights_wait_for_room(stage: Stage, small_disk: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "RETRY_SECONDS", 0.01)
    calls: list[float] = []
    wait = time.sleep

    def sleep(seconds: float) -> None:
        if seconds == 0.01:
            calls.append(seconds)
            (small_disk / "filler").unlink()
        wait(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    stage.planned = {6: lambda: fill(small_disk)}
    stage.train(output_dir=str(small_disk / "out"))
    assert calls == [0.01]
    assert "the trained weights could not be written: " in stage.said
    assert weights(small_disk / "out") == weights(whole)


@pytest.mark.fault("read-only folder")
def test_a_folder_that_can_only_be_read_is_told(stage: Stage, small_disk: Path, capsys: pytest.CaptureFixture[str], keys: Keys) -> None:
    """Before anything is loaded where it is so from the start; and in mid-run like a full disk."""
    out = small_disk / "out"
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = [f"{key}={value}" for key, value in keys(output_dir=str(out)).items()]
    assert main(["train", *words]) == 2
    assert "cannot be made or written to: Read-only file system" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)

    stage.planned = {
        2: lambda: subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(out)], check=True),
        4: lambda: subprocess.run(["umount", str(out)], check=True),
    }
    stage.train(output_dir=str(out))
    assert "Read-only file system" in stage.said
    assert steps_of(out) == [1, 4, 5, 6]


@pytest.mark.fault("lost mount")
def test_a_lost_mount(stage: Stage, small_disk: Path, whole: Path) -> None:
    """What was under the mount point takes the checkpoints from then on."""
    out = small_disk / "out"
    stage.planned = {3: lambda: subprocess.run(["umount", "-l", str(small_disk)], check=True)}
    stage.train(output_dir=str(out))
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(small_disk / "out")], check=True)  # the fixture unmounts one
    subprocess.run(["umount", "-l", str(small_disk / "out")], check=True)
    assert "is gone: it is made anew" in stage.said
    assert steps_of(out) == [3, 4, 5, 6]
    assert weights(out) == weights(whole)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(small_disk)], check=True)


@pytest.mark.fault("deleted folder")
def test_a_deleted_folder_is_made_anew(stage: Stage, whole: Path) -> None:
    out = stage.tmp_path / "out"
    stage.planned = {3: lambda: shutil.rmtree(out)}
    stage.train(output_dir=str(out))
    assert "is gone: it is made anew" in stage.said
    assert steps_of(out) == [3, 4, 5, 6]
    assert weights(out) == weights(whole)
    assert (out / "run.yaml").exists()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILT = ["adapter_model.safetensors", "optimizer.safetensors", "rank_0.safetensors", "progress.json"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(f"corrupt {name}")) for name in SPOILT])
def test_a_corrupt_checkpoint_is_passed_over(name: str, stage: Stage, whole: Path) -> None:
    """One flipped bit of a file is enough; the one before it serves, and the end is the same."""
    out = _cut(whole, stage.tmp_path / "out")
    _flip(out / "checkpoint-6" / name)
    _flip(out / "checkpoint-5" / name)
    stage.train(output_dir=str(out))
    assert f"{name} has other content than was written" in stage.said
    assert f"going on with {out / 'checkpoint-4'}" in stage.said
    assert weights(out) == weights(whole)


@pytest.mark.fault("a flipped bit in any file of a checkpoint")
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found(stage: Stage, whole: Path) -> None:
    """Also in files that no run goes on with, such as the tokenizer's and the card, and in the list of all files itself."""
    out = _cut(whole, stage.tmp_path / "out")
    files = sorted(path for path in (out / "checkpoint-6").rglob("*") if path.is_file())
    assert {*SPOILT, "adapter_config.json", "trainer_state.json", "run.json", "scheduler.json", "complete.json", "tokenizer.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        _flip(path)
        found = checkpoints.newest(out)
        assert found is not None and found.step == 5, path.name
        path.write_bytes(content)
    whole_again = checkpoints.newest(out)
    assert whole_again is not None and whole_again.step == 6


def _cut(whole: Path, out: Path) -> Path:
    """A copy of a run's folder as if it had been killed before its end."""
    shutil.copytree(whole, out)
    (out / "manifest.json").unlink()
    return out


@pytest.mark.fault("truncated shard")
def test_a_truncated_shard(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model in several files: named outright, its checkpoint is refused; else the one before it serves, and the end is the same."""
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", partialmethod(save, max_shard_size="60KB"))
    whole = stage.train(finetuning_type="full")
    out = _cut(whole, stage.tmp_path / "cut")
    shards = sorted((out / "checkpoint-6").glob("model-*.safetensors"))
    assert len(shards) > 2 and (out / "checkpoint-6" / "model.safetensors.index.json").exists()
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    told = stage.complaint(finetuning_type="full", output_dir=str(out), resume_from_checkpoint=str(shards[1].parent), max_steps=8)
    assert "holds no complete checkpoint" in told
    stage.train(finetuning_type="full", output_dir=str(out))
    assert f"{out / 'checkpoint-6'} is not complete" in stage.said
    assert f"going on with {out / 'checkpoint-5'}" in stage.said
    ours, theirs = ({path.name: path.read_bytes() for path in folder.glob("model*")} for folder in (out, whole))
    assert ours == theirs and len(ours) == len(shards) + 1


@pytest.mark.fault("truncated shard of the base model")
def test_a_truncated_shard_of_the_base_model(stage: Stage, tiny_model: Path) -> None:
    """It is named before anything is trained."""
    from transformers import AutoModelForCausalLM

    model = Path(shutil.copytree(tiny_model, stage.tmp_path / "sharded"))
    (model / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(str(tiny_model)).save_pretrained(str(model), max_shard_size="60KB")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert stage.complaint(model_name_or_path=str(model)).startswith(f"{shard} cannot be read as safetensors: ")


@pytest.mark.fault("killed worker")
def test_a_killed_worker(stage: Stage) -> None:
    """A process that loads data is killed, as for want of memory: one line tells it, and the same command then loses nothing."""
    import multiprocessing

    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
            # on a busy machine it dies late: the steps that are loaded already would be done, and saved, before that is known
            os.waitid(os.P_PID, child.pid or 0, os.WEXITED | os.WNOWAIT)

    given = {"dataloader_num_workers": 1, "max_steps": 8, "save_steps": 2, "lora_dropout": 0.1}  # 6 steps to an epoch
    whole = stage.train(output_dir=str(stage.tmp_path / "whole"), **given | {"dataloader_num_workers": 0})
    out = stage.tmp_path / "out"
    stage.planned = {3: kill}
    told = stage.complaint(output_dir=str(out), **given)
    assert "a process that loads data was killed" in told and "checkpoint-2" in told
    assert steps_of(out) == [2] and not stage.planned
    stage.train(output_dir=str(out), **given)
    assert f"going on with {out / 'checkpoint-2'}" in stage.said
    assert weights(out) == weights(whole)


@pytest.mark.fault("clock jump")
@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0], ids=["back", "on"])
def test_a_clock_that_jumps(jump: float, stage: Stage, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is counted, sorted or deleted by the time of day."""
    clock, moved = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + moved[0])
    stage.planned = {3: lambda: moved.__setitem__(0, jump)}
    out = stage.train(save_total_limit=2, output_dir=str(stage.tmp_path / "out"))
    assert steps_of(out) == [5, 6]
    assert weights(out) == weights(whole)
    assert all(line["elapsed_time"].startswith("0:00:") for line in lines(out))


@pytest.mark.fault("two runs in one folder")
def test_two_runs_in_one_folder(stage: Stage) -> None:
    """The second is told; a lock of a process that was killed keeps nobody out."""
    out = stage.tmp_path / "out"
    out.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline()
            told = stage.complaint(output_dir=str(out))
            assert f"another run is at work in {out} (process {other.pid} on " in told
        finally:
            other.kill()
    stage.train(output_dir=str(out))


BEST = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": "sums"}
"""The loss falls, so that the first checkpoint stays the best."""
KEPT = [({}, [2, 4]), ({"save_total_limit": 1}, [4]), ({"save_total_limit": 1, **BEST}, [2, 4])]


@pytest.mark.parametrize(("given", "left"), KEPT, ids=["all", "one", "one and the best"])
def test_a_run_that_cannot_save_at_all_tells_where_the_last_checkpoint_is(
    given: dict[str, Any], left: list[int], stage: Stage, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has not deleted it, nor the best, for one that could not be written."""
    monkeypatch.setattr(kept, "RETRY_SECONDS", 0.0)
    stage.planned = {6: lambda: fill(small_disk)}
    told = stage.complaint(output_dir=str(small_disk / "out"), save_steps=2, **given)
    assert "the trained weights could not be written" in told and "its newest checkpoint is all there is" in told
    assert steps_of(small_disk / "out") == left


@pytest.mark.parametrize(("given", "best"), [({}, []), (BEST, [2])], ids=["newest", "newest and best"])
def test_no_checkpoint_goes_before_the_next_is_whole(
    given: dict[str, Any], best: list[int], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `save_total_limit: 1`; one fails when all but its list of files is there."""
    out, there, work = stage.tmp_path / "out", [], checkpoints.sync

    def sync(path: Path) -> None:
        if path.name == checkpoints.COMPLETE:
            there.append(steps_of(out))
            if path.parent == checkpoints.beside(out, 6):
                raise OSError(errno.EIO, "Input/output error")
        work(path)

    monkeypatch.setattr(checkpoints, "sync", sync)
    stage.train(output_dir=str(out), save_total_limit=1, save_steps=2, max_steps=8, **given)
    assert "the checkpoint of step 6 could not be written: Input/output error" in stage.said
    assert there == [[], [2], [*best, 4], [*best, 4]]
    assert steps_of(out) == [*best, 8]
