"""The catalogue of faults: disks, files, processes and clocks that go wrong under a run. None loses what was trained."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finery
from finery.cli import main
from finery.errors import UserError
from finery.training import checkpoints, kept
from survived import HOLDER, Stage, fill, lines, steps_of, weights

Keys = Callable[..., dict[str, Any]]
Record = Callable[[str, object], None]


@pytest.mark.parametrize("estimated", [True, False], ids=["told before", "met while writing"])
def test_a_full_disk_costs_a_checkpoint_and_no_more(
    estimated: bool, stage: Stage, small_disk: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
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
    record_property("fault", "full disk")


def test_a_missed_checkpoint_is_tried_again_soon(stage: Stage, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only when the next one is due."""
    monkeypatch.setattr(kept, "RETRY_SECONDS", 0.0)
    stage.planned = {2: lambda: fill(small_disk), 4: (small_disk / "filler").unlink}
    stage.train(output_dir=str(small_disk / "out"), save_steps=2, max_steps=7)
    assert steps_of(small_disk / "out") == [4, 6, 7]
    stage.planned = {3: lambda: fill(small_disk), 5: (small_disk / "filler").unlink}
    stage.train(output_dir=str(small_disk / "other"), save_steps=3, max_steps=7)
    assert steps_of(small_disk / "other") == [5, 6, 7]


def test_trained_weights_wait_for_room(
    stage: Stage, small_disk: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
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
    record_property("fault", "full disk at the end")


def test_a_folder_that_can_only_be_read_is_told(
    stage: Stage, small_disk: Path, capsys: pytest.CaptureFixture[str], keys: Keys, record_property: Record
) -> None:
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
    record_property("fault", "read-only folder")


def test_a_lost_mount(stage: Stage, small_disk: Path, whole: Path, record_property: Record) -> None:
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
    record_property("fault", "lost mount")


def test_a_deleted_folder_is_made_anew(stage: Stage, whole: Path, record_property: Record) -> None:
    out = stage.tmp_path / "out"
    stage.planned = {3: lambda: shutil.rmtree(out)}
    stage.train(output_dir=str(out))
    assert "is gone: it is made anew" in stage.said
    assert steps_of(out) == [3, 4, 5, 6]
    assert weights(out) == weights(whole)
    assert (out / "run.yaml").exists()
    record_property("fault", "deleted folder")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "rank_0.safetensors", "progress.json"])
def test_a_corrupt_checkpoint_is_passed_over(name: str, stage: Stage, whole: Path, record_property: Record) -> None:
    """One flipped bit of a file is enough; the one before it serves, and the end is the same."""
    stage.train(max_steps=6, output_dir=str(out := stage.tmp_path / "out"))
    _unfinish(out)
    _flip(out / "checkpoint-6" / name)
    _flip(out / "checkpoint-5" / name)
    stage.train(output_dir=str(out))
    assert f"{name} has other content than was written" in stage.said
    assert f"going on with {out / 'checkpoint-4'}" in stage.said
    assert weights(out) == weights(whole)
    record_property("fault", f"corrupt {name}")


def _unfinish(out: Path) -> None:
    """As if the run had been killed before its end."""
    (out / "manifest.json").unlink()


def test_a_truncated_shard(stage: Stage, record_property: Record) -> None:
    """Of a model in several files; named outright, it is refused with the file's name."""
    out = stage.train(finetuning_type="full")
    shard = out / "checkpoint-6" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    told = stage.complaint(finetuning_type="full", resume_from_checkpoint=str(shard.parent), max_steps=8)
    assert "holds no complete checkpoint" in told
    _unfinish(out)
    stage.train(finetuning_type="full")
    assert f"{out / 'checkpoint-6'} is not complete" in stage.said
    assert f"going on with {out / 'checkpoint-5'}" in stage.said
    record_property("fault", "truncated shard")


def test_a_killed_worker(stage: Stage, record_property: Record) -> None:
    """A process that loads data is killed, as for want of memory: one line tells it, and the run can be gone on with."""
    import multiprocessing

    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)

    stage.planned = {3: kill}
    told = stage.complaint(dataloader_num_workers=1, max_steps=40, save_steps=2)
    assert "a process that loads data was killed" in told and "checkpoint-2" in told
    record_property("fault", "killed worker")


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0], ids=["back", "on"])
def test_a_clock_that_jumps(jump: float, stage: Stage, whole: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    """Nothing is counted, sorted or deleted by the time of day."""
    clock, moved = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + moved[0])
    stage.planned = {3: lambda: moved.__setitem__(0, jump)}
    out = stage.train(save_total_limit=2, output_dir=str(stage.tmp_path / "out"))
    assert steps_of(out) == [5, 6]
    assert weights(out) == weights(whole)
    assert all(line["elapsed_time"].startswith("0:00:") for line in lines(out))
    record_property("fault", "clock jump")


def test_two_runs_in_one_folder(stage: Stage, record_property: Record) -> None:
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
    record_property("fault", "two runs in one folder")


def test_a_run_that_cannot_save_at_all_tells_where_the_last_checkpoint_is(
    stage: Stage, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "RETRY_SECONDS", 0.0)
    stage.planned = {4: lambda: fill(small_disk)}
    with pytest.raises(UserError, match="the trained weights could not be written"):
        finery.train(stage.keys(output_dir=str(small_disk / "out"), save_strategy="steps", save_steps=2, max_steps=6))
    assert steps_of(small_disk / "out") == [2]
