"""What is kept of a job: its files, their owner, its output, which loses no line while it is moved."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from background import SLEEP, WAIT, end, own_jobs, reach, submit, until
from finery import jobs
from finery.errors import UserError
from finery.jobs import Status
from finery.jobs.output import LIMIT_BYTES, Output


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of jobs for each test."""
    with own_jobs(tmp_path / "jobs", monkeypatch) as folder:
        yield folder


def test_watchers_come_and_go(tmp_path: Path) -> None:
    """Other processes tell the state from files and follow to the end; one that is killed takes nothing with it."""
    job = submit(
        f"print('line 0', flush=True)\n{WAIT}\nfor n in range(1, 8): print('line', n, flush=True); time.sleep(0.1)", str(tmp_path / "go")
    )
    reach(job, "running")
    command = [sys.executable, "-m", "finery", "jobs", "follow", job.id]
    watchers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = subprocess.run([sys.executable, "-m", "finery", "jobs", "--json"], capture_output=True, text=True, check=True)
    found = json.loads(told.stdout)
    assert (found["id"], found["state"], found["step"]) == (job.id, "running", None)
    for watcher in watchers:
        assert watcher.stdout
        assert watcher.stdout.readline() == "line 0\n"
    watchers[0].kill()
    watchers[0].communicate()
    (tmp_path / "go").touch()
    for watcher in watchers[1:]:
        out, err = watcher.communicate(timeout=60)
        assert out.splitlines() == [f"line {number}" for number in range(1, 8)]
        assert watcher.returncode == 0
        assert f"job {job.id} has finished" in err
    assert job.status().state == "finished"


@pytest.mark.parametrize("cuts", [True, False])
def test_rotation_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: bool) -> None:
    """A follower reads every line, in order, while the file is moved under its eyes; also where the file system cannot cut."""
    job = submit("pass")
    end(job)
    if not cuts:
        monkeypatch.setattr("finery.jobs.output._cut", lambda *_: False)
    monkeypatch.setattr(Status, "has_ended", property(lambda self: done.is_set()))
    done, found = threading.Event(), []
    follower = threading.Thread(target=lambda: found.extend(job.lines(follow=True)))
    follower.start()
    output = Output(job.folder)
    log = output.open()
    rotations = 0
    for number in range(4000):
        os.write(log, f"{number:05} {'x' * 60}\n".encode())
        if number % 200 == 199:
            rotations += output.rotate(20_000, 50)
            time.sleep(0.02)
    done.set()
    follower.join(60)
    os.close(log)
    assert rotations >= 5
    assert [int(line[:5]) for line in found] == list(range(4000))
    assert list(job.lines()) == found
    assert [int(line[:5]) for line in job.lines(last=3)] == [3997, 3998, 3999]
    assert list(job.lines(last=0)) == []


WRITES = """
import sys
from pathlib import Path
number = 0
while number < 60_000 or number < 400_000 and not Path(sys.argv[1]).exists():
    print(number, 'x' * 40, flush=True)
    number += 1
Path(sys.argv[2]).write_text(str(number))
"""
"""Writes lines, as many as it says in a file, until there is another file: who moves them may be slower than it is."""


def test_rotation_while_a_run_writes(root: Path, tmp_path: Path) -> None:
    """The run's own file is moved while it writes without a pause; where the file system can cut, nothing is lost."""
    moved, written = tmp_path / "moved", tmp_path / "written"
    job = submit(WRITES, str(moved), str(written))
    output, rotations = Output(job.folder), 0
    reach(job, "running", "finished")
    while not job.status().has_ended:
        rotations += output.rotate(100_000, 100)
        if rotations >= 2 and not moved.exists():
            moved.touch()
    numbers, total = [int(line.split()[0]) for line in job.lines() if line], int(written.read_text())
    assert rotations >= 2 and total >= 60_000
    if "output.log" in {path.name for path in job.folder.iterdir()} and _can_cut(root):
        assert numbers == list(range(total))
    else:
        assert len(numbers) > total - 1000


def test_a_supervisor_rotates_by_itself(tmp_path: Path) -> None:
    """At its own limit, while the run is at work: what is printed later begins a new file."""
    code = f"for n in range(250_000): print(f'{{n:07}}', 'x' * 92)\nprint('', end='', flush=True)\n{WAIT}\nprint('after')"
    job = submit(code, str(tmp_path / "go"))
    older = job.folder / "output.log.1"
    until(older.exists)
    until(lambda: (job.folder / "output.log").stat().st_size < LIMIT_BYTES)
    (tmp_path / "go").touch()
    assert end(job).state == "finished"
    assert older.stat().st_size > LIMIT_BYTES
    assert sum(path.stat().st_size for path in job.folder.glob("output.log*")) == 250_000 * 101 + len("after\n")
    assert list(job.lines(last=2)) == [f"0249999 {'x' * 92}", "after"]
    assert next(job.lines()) == f"0000000 {'x' * 92}"


def _can_cut(folder: Path) -> bool:
    from finery.jobs.output import _cut

    path = folder / "probe"
    path.write_bytes(bytes(3 * os.statvfs(folder).f_bsize))
    file = os.open(path, os.O_RDWR)
    try:
        return _cut(file, os.statvfs(folder).f_bsize)
    finally:
        os.close(file)


def test_who_comes_late_is_told_what_is_gone() -> None:
    job = submit("pass")
    end(job)
    output = Output(job.folder)
    log = output.open()
    lines = job.lines()
    os.write(log, b"first\n")
    assert next(lines) == "first"
    for _ in range(4):
        os.write(log, b"x" * 9999 + b"\n")
        output.rotate(5000, 1)
    assert "bytes are no longer kept" in next(lines)
    assert sorted(path.name for path in job.folder.glob("output.log*")) == ["output.log", "output.log.1"]
    os.close(log)


def test_how_a_job_is_named(root: Path) -> None:
    with pytest.raises(UserError, match="there are none at all"):
        jobs.find("last")
    first, second, third = (submit("pass", name=name) for name in ("blue", "red", "red"))
    assert jobs.find(first.id) == jobs.find("blue") == first
    assert jobs.find("last") == jobs.find("red") == third, "of several, the newest"
    assert jobs.find(second.id[-5:]) == second, "-HHMMSS: the seconds differ"
    with pytest.raises(UserError, match=r"may be any of .*red.*give more of the id"):
        jobs.find(first.id[:3])
    with pytest.raises(UserError, match=rf"there is no job 'green'; there are: {first.id} \(blue\), "):
        jobs.find("green")
    with pytest.raises(UserError, match="begins with a letter"):
        jobs.start([], root, name="7")


def test_removing(tmp_path: Path, root: Path) -> None:
    (tmp_path / "weights").mkdir()
    job = submit(SLEEP, output_dir=str(tmp_path / "weights"))
    with pytest.raises(UserError, match="stop it first"):
        job.remove()
    job.stop(now=True)
    job.remove()
    assert not jobs.jobs()
    assert (tmp_path / "weights").is_dir()
    assert {path.name for path in root.iterdir()} == {".queue", ".slots"}


def test_the_folder_is_for_its_owner_alone(root: Path) -> None:
    job = submit("pass")
    assert [path.stat().st_mode & 0o777 for path in (root, job.folder, job.folder / "output.log")] == [0o700, 0o700, 0o600]


def test_where_jobs_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert jobs.jobs_folder() == tmp_path / "jobs"
    monkeypatch.setenv("FINERY_JOBS", "/proc/none/of/it")
    with pytest.raises(UserError, match="FINERY_JOBS names another"):
        jobs.jobs_folder()
    monkeypatch.delenv("FINERY_JOBS")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert jobs.jobs_folder() == tmp_path / "state" / "finery" / "jobs"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jobs.jobs_folder() == tmp_path / ".local" / "state" / "finery" / "jobs"
    monkeypatch.setenv("FINERY_JOBS", str(tmp_path / "jobs"))


def test_progress_is_the_last_line_of_the_runs_log(tmp_path: Path) -> None:
    log = tmp_path / "out" / "trainer_log.jsonl"
    log.parent.mkdir()
    log.write_text(json.dumps({"current_steps": 9, "total_steps": 9, "remaining_time": "0:00:00"}) + "\n")
    os.utime(log, (1, 1))
    job = submit(SLEEP, output_dir="out", cwd=tmp_path)
    assert reach(job, "running").progress is None, "that was another run"
    lines = [{"current_steps": 3, "loss": 1.5}, {"current_steps": 4, "eval_loss": 2.0}]
    log.write_text("".join(json.dumps(line | {"total_steps": 9, "remaining_time": "0:01:00"}) + "\n" for line in lines) + '{"cur')
    os.utime(log, times=(time.time(), time.time()))  # by itself a file may be dated some milliseconds back, before the run began
    progress = job.status().progress
    assert progress
    assert asdict(progress) == {"step": 4, "total": 9, "loss": 1.5, "remaining": "0:01:00"}
