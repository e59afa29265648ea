"""A run that is told to end finishes its step, saves, and ends well; told twice, it ends at once; SIGUSR1 saves and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finery
from finery.errors import Stopped
from finery.training.trainer import Trainer
from kills import left_over
from survived import Stage, lines, steps_of, weights

Keys = Callable[..., dict[str, Any]]


def told(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_end_that_is_asked_for_is_a_pause(number: int, stage: Stage, whole: Path) -> None:
    """In the middle of an epoch; the same command then ends as if nothing had been."""
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    if before[1] is signal.SIG_IGN:
        pytest.skip("SIGINT is ignored in whatever started the tests")
    stage.planned = {2: told(number)}
    out = stage.tmp_path / "out"
    with pytest.raises(Stopped) as end:
        stage.train(output_dir=str(out), save_steps=50)
    assert end.value.saved
    assert "ended after step 2 of 6, as it was told: the same command goes on with" in stage.said
    assert steps_of(out) == [2] and not (out / "adapter_model.safetensors").exists()
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    stage.train(output_dir=str(out), save_steps=50)
    assert weights(out) == weights(whole)
    assert [line["current_steps"] for line in lines(out) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_sigusr1_saves_and_goes_on(stage: Stage, whole: Path) -> None:
    stage.planned = {3: told(signal.SIGUSR1)}
    out = stage.train(output_dir=str(stage.tmp_path / "out"), save_strategy="no")
    assert steps_of(out) == [3]
    assert weights(out) == weights(whole)


def test_sigusr1_outside_of_steps_ends_nothing(keys: Keys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def session(run: Any, expected: Any) -> Path:
        os.kill(os.getpid(), signal.SIGUSR1)
        return run.folder

    monkeypatch.setattr("finery.commands.train._in_session", session)
    finery.train(keys())
    assert "SIGUSR1: no steps are being trained now" in caplog.text
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_an_evaluation_is_broken_off_and_made_up_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is due when the run goes on: the log reads as that of a run that nobody stopped."""
    given = {"eval_dataset": "sums", "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, "save_steps": 4}
    whole = stage.train(output_dir=str(stage.tmp_path / "whole"), **given)
    out = stage.tmp_path / "out"
    with monkeypatch.context() as patch:
        heed = Trainer.heed

        def heed_late(self: Trainer) -> None:
            if self.state.global_step == 4 and self.model.training is False:  # type: ignore[union-attr]
                self.signals.stop = True
            heed(self)

        patch.setattr(Trainer, "heed", heed_late)
        with pytest.raises(Stopped):
            stage.train(output_dir=str(out), **given)
    assert not any("eval_loss" in line for line in lines(out) if line["current_steps"] == 4)
    stage.train(output_dir=str(out), **given)
    figures = ("current_steps", "loss", "eval_loss", "lr", "grad_norm")
    ours, theirs = ([{key: line[key] for key in figures if key in line} for line in lines(folder)] for folder in (out, whole))
    assert ours == theirs
    assert weights(out) == weights(whole)


def _start(keys: Keys, out: Path, **environment: str) -> "subprocess.Popen[str]":
    given = keys(output_dir=str(out), max_steps=100000, save_strategy="no", logging_steps=1)
    command = [sys.executable, "-m", "finery", "train", *(f"{key}={json.dumps(value)}" for key, value in given.items())]
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment
    )
    assert run.stderr is not None
    said = []
    for line in run.stderr:
        said.append(line)
        if "step 1/" in line:
            return run
    raise AssertionError("".join(said))


def test_a_process_ends_with_0_and_a_word(keys: Keys, tmp_path: Path) -> None:
    with _start(keys, tmp_path / "out") as run:
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=180)
    assert run.returncode == 0, said
    assert "SIGTERM: the step is finished and saved, then the run ends; once more ends it at once" in said
    assert "as it was told" in said and "Traceback" not in said


def test_a_process_that_is_told_twice_ends_at_once(keys: Keys, tmp_path: Path) -> None:
    """It stands still while both come, so that no step is done between them; two of one kind would be one by then.

    Which of the two it hears first is open: the kernel may give each to another thread.
    """
    import psutil

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("SIGINT is ignored in whatever started the tests")
    with _start(keys, tmp_path / "out") as run:
        os.kill(run.pid, signal.SIGSTOP)
        while psutil.Process(run.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            run.send_signal(number)
        _, said = run.communicate(timeout=180)
    ends = {128 + signal.SIGTERM: "SIGINT", 128 + signal.SIGINT: "SIGTERM"}
    assert run.returncode in ends, said
    assert f"{ends[run.returncode]}: the step is finished and saved, then the run ends" in said and "as it was told" not in said
    assert not steps_of(tmp_path / "out") and not left_over(run.pid)


def test_several_processes_save_and_end_after_the_same_step(keys: Keys, tmp_path: Path) -> None:
    """Only torchrun's own process is told; each of the others saves what it alone has, and none is left."""
    import psutil

    out = tmp_path / "out"
    with _start(keys, out, FORCE_TORCHRUN="1", NPROC_PER_NODE="2") as run:
        children = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 180  # two processes take long to come up, which is no part of it
        while not (saved := steps_of(out)) or lines(out)[-1]["current_steps"] <= saved[0]:  # it has saved, and goes on
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=180)
    assert run.returncode == 0, said
    assert "as it was told: the same command goes on with" in said and "Traceback" not in said
    first, last = steps_of(out)
    assert first < last
    for step in (first, last):
        files = {path.name for path in (out / f"checkpoint-{step}").iterdir()}
        assert {"rank_0.json", "rank_1.json", "optimizer.safetensors", "complete.json"} <= files
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=60)[1]


def test_a_second_signal_ends_the_process_at_once() -> None:
    """Whatever the step is at."""
    code = (
        "import os, signal, time\nfrom finery.training.signals import Signals\n"
        "with Signals() as heard:\n    os.kill(os.getpid(), signal.SIGTERM)\n    assert heard.stop\n"
        "    print('once', flush=True)\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "once\n")


def test_python_hears_of_it_too(stage: Stage) -> None:
    """`finery.train` raises what a Ctrl-C raises, once everything is saved."""
    stage.planned = {1: told(signal.SIGTERM)}
    with pytest.raises(KeyboardInterrupt):
        finery.train(stage.keys(save_strategy="no", max_steps=5))


def test_an_evaluation_before_the_first_step_is_broken_off(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    heed = Trainer.heed

    def heed_at_once(self: Trainer) -> None:
        self.signals.stop = True
        heed(self)

    monkeypatch.setattr(Trainer, "heed", heed_at_once)
    with pytest.raises(Stopped) as end:
        stage.train(eval_dataset="sums", eval_strategy="steps", eval_steps=2, eval_on_start=True)
    assert end.value.saved and "ended before the first step, as it was told" in stage.said


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"save_only_model": True}, "told: the same command goes on with"),
        (
            {"overwrite_output_dir": True},
            "with 'resume_from_checkpoint: true', and without 'overwrite_output_dir', the same command goes on",
        ),
    ],
    ids=["models alone", "overwriting"],
)
def test_how_to_go_on_is_told_and_true(changes: dict[str, Any], how: str, stage: Stage, whole: Path) -> None:
    """A checkpoint for an end always holds the optimizer's state."""
    stage.planned = {2: told(signal.SIGTERM)}
    out = str(stage.tmp_path / "out")
    with pytest.raises(Stopped):
        stage.train(output_dir=out, **changes)
    assert how in stage.said
    again = changes if "save_only_model" in changes else {"resume_from_checkpoint": True}
    assert weights(stage.train(output_dir=out, **again)) == weights(whole)


@pytest.mark.filterwarnings("ignore")  # of the optimizer's package
def test_an_optimizer_that_cannot_be_saved_does_not_die_of_a_signal(stage: Stage) -> None:
    stage.planned = {2: told(signal.SIGUSR1)}
    out = stage.train(optim="grokadamw", save_strategy="no", finetuning_type="full", max_steps=4)
    assert "the state of the optimizer cannot be saved without pickle" in stage.said
    assert (out / "model.safetensors").exists() and not list(out.glob(".*.part"))
