"""trainer_log.jsonl and what is seen on the terminal: written line by line, whole after a resume, and never the end of a run."""

import errno
import json
import os
import pty
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import finery.training.callbacks.log_file as log_file
from finery.training.callbacks import CALLBACKS
from watched import Bench

SAVES = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "val_size": 4, "eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


class Log:
    """The callback by itself, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        part = CALLBACKS["log_file"]
        self.part = part(part.Options())
        self.path = folder / "trainer_log.jsonl"
        self.args = SimpleNamespace(output_dir=str(folder))
        self.state: Any = SimpleNamespace(
            global_step=0, max_steps=9, epoch=0.0, num_input_tokens_seen=0, is_world_process_zero=True, log_history=[]
        )

    def begin(self, step: int = 0, logged: tuple[int, ...] = ()) -> None:
        self.state.global_step, self.state.log_history = step, [{"step": number} for number in logged]
        self.part.on_train_begin(self.args, self.state, None)

    def write(self, *steps: int) -> None:
        for step in steps:
            self.state.global_step = step
            self.part.on_log(self.args, self.state, None, logs={"loss": 1.0})

    @property
    def steps(self) -> list[int]:
        return [json.loads(line)["current_steps"] for line in self.path.read_text().splitlines()]


def fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The disk is full from now on, or is there again where `number` is 0."""

    def fsync(_: int) -> None:
        if number:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(log_file.os, "fsync", fsync)


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    for step in (1, 2, 3):
        log.write(step)
        assert log.steps == list(range(1, step + 1))
        assert log.path.read_text().endswith("\n")


def test_a_full_disk_costs_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path)
    log.begin()
    log.write(1)
    fails(monkeypatch, errno.ENOSPC)
    log.write(2, 3)
    assert log.steps == [1], "half of what could not be written was left"
    told = capsys.readouterr().err.splitlines()
    assert told == [f"warning: {log.path} cannot be written (No space left on device): its lines wait, and the run goes on"]
    fails(monkeypatch, 0)
    log.write(4)
    assert log.steps == [1, 2, 3, 4]
    assert capsys.readouterr().err.splitlines() == [f"{log.path} can be written again, and holds the lines that had to wait"]


def test_a_deleted_folder_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    log = Log(folder)
    log.begin()
    log.write(1)
    shutil.rmtree(folder)
    log.write(2, 3)
    assert not folder.exists()
    assert capsys.readouterr().err.count("warning") == 1
    folder.mkdir()
    log.write(4)
    assert log.steps == [2, 3, 4]


def test_another_runs_lines_go_when_a_run_begins(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.write(1, 2, 3)
    log.begin()
    assert log.path.read_text() == ""
    log.write(1)
    assert log.steps == [1]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", []),
        ('{"current_steps": 1}\n{"current_steps": 2}\n{"current_steps": 3}\n', [1, 2]),
        ('{"current_steps": 1}\n{"current_steps": 2}\n{"current_steps": 2}\n', [1, 2]),  # it was not there when step 2 was saved
        ('{"current_steps": 1}\n{"current_steps": 2}\n{"current_st', [1, 2]),
        ('{"current_steps": 1}\n{"current_steps": 2}', [1]),  # torn where nothing shows it: step 2 is lost
        ('{"current_steps": 1}\n\0\0\0\n[]\n{}\n{"current_steps": "2"}\n{"current_steps": 2}\n', [1, 2]),
    ],
)
def test_a_resumed_run_goes_on_where_the_checkpoint_is(tmp_path: Path, text: str, kept: list[int]) -> None:
    log = Log(tmp_path)
    log.path.write_text(text)
    log.begin(2, logged=(1, 2))
    assert log.steps == kept
    log.write(3)
    assert log.steps == [*kept, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_log.jsonl"]


def test_a_file_that_cannot_be_cut_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def replace(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(log_file, "replace_text", replace)
    log = Log(tmp_path)
    log.path.write_text('{"current_steps": 9}\n')
    log.begin(2)
    assert "cannot be written (Read-only file system)" in capsys.readouterr().err


TIMES = ("elapsed_time", "remaining_time", *log_file.SPEEDS)


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_after_a_resume_it_reads_as_that_of_an_undisturbed_run(bench: Bench) -> None:
    whole = bench.train(**SAVES)
    cut = bench.tmp_path / "cut"
    shutil.copytree(whole.folder, cut)
    shutil.rmtree(cut / "checkpoint-4")
    (cut / "manifest.json").unlink()  # it has not ended
    with (cut / "trainer_log.jsonl").open("a") as file:
        file.write('{"current_steps": 4, "lo')
    rest = bench.train(**SAVES, output_dir=str(cut))
    assert not rest.complaint and "going on with" in rest.said
    assert without_times(rest.log) == without_times(whole.log)


def test_a_run_survives_a_log_that_cannot_be_written(bench: Bench) -> None:
    out = bench.tmp_path / "out"
    (out / "trainer_log.jsonl").mkdir(parents=True)
    run = bench.train(output_dir=str(out))
    assert not run.complaint and run.said.count("trainer_log.jsonl cannot be written") == 1
    assert (out / "adapter_model.safetensors").exists()


# ------------------------------------------------------------------ who watches


def words_of(given: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "finery", "train", *(f"{key}={json.dumps(value)}" for key, value in given.items())]


def test_a_person_sees_a_bar_and_a_pipe_gets_lines(keys: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    piped = subprocess.run(words_of(keys(output_dir=str(tmp_path / "piped"))), capture_output=True, text=True, timeout=300, check=True)
    assert "step 1/2  loss " in piped.stderr and "\x1b[" not in piped.stderr
    shown = in_terminal(words_of(keys(output_dir=str(tmp_path / "shown"))))
    assert "2/2" in shown and "tokens/s" in shown and "━" in shown
    assert "step 1/2  loss " not in shown, "a bar needs no lines beside it"
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0, "the cursor is not given back"


def in_terminal(words: list[str]) -> str:
    """What a program shows to a terminal of its own."""
    ours, theirs = pty.openpty()
    said, end = b"", time.monotonic() + 300
    terminal = {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **terminal}) as program:
        os.close(theirs)
        with os.fdopen(ours, "rb", buffering=0) as screen, selectors.PollSelector() as arrived:
            arrived.register(screen, selectors.EVENT_READ)
            while time.monotonic() < end:
                if not arrived.select(timeout=1):
                    continue
                try:
                    got = screen.read(65536)
                except OSError:  # Linux tells the end of a terminal so
                    break
                if not got:
                    break
                said += got
        if time.monotonic() >= end:
            program.kill()
    assert program.returncode == 0
    return said.decode(errors="replace")
