"""Jobs are processes of their own: they outlive everybody, are known for sure, and a stop reaches all of them and nobody else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from background import FAMILY, SLEEP, WAIT, course_of, end, own_jobs, reach, submit, until
from finery import jobs
from finery.errors import UserError
from finery.jobs import Job, Order, process
from finery.jobs.process import Process, family


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of jobs for each test."""
    with own_jobs(tmp_path / "jobs", monkeypatch) as folder:
        yield folder


def test_how_jobs_end() -> None:
    codes = ["print('well')", "raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)"]
    every = [submit(code, slots=(str(number),)) for number, code in enumerate(codes)]
    told = [end(job) for job in every]
    assert [(status.state, status.exit_code) for status in told] == [("finished", 0), ("failed", 3), ("failed", -9)]
    assert "SIGKILL" in told[2].why
    assert list(every[0].lines()) == ["well"]
    assert jobs.jobs() == every
    assert told[0].began
    assert told[0].ended
    assert every[0].created <= told[0].began <= told[0].ended


def test_a_command_that_is_not_there() -> None:
    job = jobs.submit(Order([], Path.cwd(), ["one"]), lambda folder: ["/no/such/program"])
    assert end(job).exit_code == 127
    assert "/no/such/program" in next(job.lines())


def test_a_job_is_a_session_of_its_own_and_outlives_who_started_it(tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = f"print('up', flush=True)\n{WAIT}\nprint('down')"
    starter = (
        "import sys, time; from pathlib import Path; from finery import jobs\n"
        f"job = jobs.submit(jobs.Order([], Path('.'), ['one']), lambda folder: [sys.executable, '-c', {code!r}, {str(go)!r}])\n"
        "print(job.id, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout
    job = jobs.find(parent.stdout.readline().strip())
    pid = reach(job, "running").pid
    assert pid
    assert os.getsid(pid) == os.getpgid(pid) == pid
    os.killpg(parent.pid, signal.SIGHUP)
    os.killpg(parent.pid, signal.SIGKILL)
    parent.communicate()
    go.touch()
    assert end(job).state == "finished"
    assert list(job.lines()) == ["up", "down"]
    supervisor = course_of(job).supervisor
    until(lambda: not supervisor.lives)


SAVES = """
import signal, sys, time
from pathlib import Path
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
print("ready", flush=True)
while not heard: time.sleep(0.05)
time.sleep(1)
while not Path(sys.argv[1]).exists(): time.sleep(0.05)
print("saved after", len(heard))
raise SystemExit({code})
"""
"""Goes on until it is told to stop, then for a second in which it might be told again, and until there is the file of its word."""


@pytest.mark.parametrize(("code", "state"), [(0, "stopped"), (1, "failed")])
def test_a_run_that_is_stopped_may_save_first(code: int, state: str, tmp_path: Path) -> None:
    job = submit(SAVES.format(code=code), str(tmp_path / "go"))
    until(lambda: list(job.lines()))
    job.stop()
    assert job.status().state == "stopping"
    (tmp_path / "go").touch()
    assert end(job).state == state
    assert list(job.lines())[-1] == "saved after 1", "told once"


def test_a_stop_now_leaves_nobody() -> None:
    job = submit(FAMILY)
    until(lambda: len(list(job.lines())) == 2)
    members = family(str(job.folder))
    assert len(members) == 3
    job.stop()
    time.sleep(0.5)
    assert job.status().state == "stopping"
    job.stop(now=True)
    assert not any(member.lives for member in members)
    assert not family(str(job.folder))
    assert job.status().state == "stopped"


def test_a_stop_now_after_the_leader_and_the_supervisor_are_gone() -> None:
    job = submit(FAMILY)
    until(lambda: len(list(job.lines())) == 2)
    reach(job, "running")
    course = course_of(job)
    assert course.run
    course.supervisor.signal(signal.SIGKILL)
    course.run.signal(signal.SIGKILL)
    assert "nobody saw how" in reach(job, "lost").why
    left = family(str(job.folder))
    assert len(left) == 2, "their mark tells whose they are"
    with pytest.raises(UserError, match="not quite over"):
        job.remove()
    job.stop(now=True)
    assert not any(member.lives for member in left)


def test_a_killed_supervisor_takes_nothing_with_it(tmp_path: Path) -> None:
    """The run goes on, holds its device, and its results tell the end."""
    write = WAIT + "Path(sys.argv[2], 'all_results.json').write_text('{}')"
    job = submit(write, str(tmp_path / "go"), str(tmp_path), output_dir=str(tmp_path))
    following = submit("pass")
    reach(job, "running")
    course_of(job).supervisor.signal(signal.SIGKILL)
    until(lambda: "its supervisor has ended" in job.status().why)
    assert job.status().state == "running"
    assert following.status().state == "queued"
    (tmp_path / "go").touch()
    status = end(job)
    assert (status.state, status.exit_code) == ("finished", None)
    assert (end(following).began or 0) >= (tmp_path / "all_results.json").stat().st_mtime - 0.1


def test_without_a_supervisor_a_run_still_hears(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    job = submit(SAVES.format(code=0), str(tmp_path / "go"))
    until(lambda: list(job.lines()))
    reach(job, "running")
    course_of(job).supervisor.signal(signal.SIGKILL)
    until(lambda: job.status().why)
    job.stop()
    assert end(job).state == "stopped"
    assert list(job.lines())[-1] == "saved after 1"


def test_a_supervisor_that_is_told_to_end_waits_for_its_run(tmp_path: Path) -> None:
    """As where a machine is shut down: everybody is told, and the end is still written down."""
    job = submit(WAIT + "raise SystemExit(5)", str(tmp_path / "go"))
    reach(job, "running")
    course_of(job).supervisor.signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert end(job).exit_code == 5


def stranger(job: Job, **changes: Any) -> subprocess.Popen[bytes]:
    """An innocent process that has the number of a job's run, as its files tell it, but for `changes`."""
    innocent = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
    of_now = Process.of(innocent.pid)
    assert of_now
    mine = replace(of_now, **changes)
    replace(course_of(job), supervisor=mine, run=mine, ended=None, exit_code=None, beat=time.time()).write(job.folder)
    return innocent


@pytest.mark.parametrize(("changes", "why"), [({"started": "17"}, "nobody saw how"), ({"boot": "another"}, "started anew")])
def test_a_number_that_was_given_to_another_is_never_signalled(changes: dict[str, str], why: str) -> None:
    job = submit("pass")
    end(job)
    innocent = stranger(job, **changes)
    try:
        assert job.status().state == "lost"
        assert why in job.status().why
        course = course_of(job)
        assert course.run
        assert not course.run.signal(signal.SIGKILL)
        assert family(str(job.folder), course.run) == []
        for now in (False, True):
            with pytest.raises(UserError, match="it is lost"):
                job.stop(now=now)
        job.remove()
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_a_job_of_another_machine() -> None:
    """Its beat tells whether it is there; it can be stopped there alone."""
    job = submit("pass")
    end(job)
    innocent = stranger(job, host="elsewhere")
    try:
        assert job.status().state == "running"
        with pytest.raises(UserError, match="runs on elsewhere"):
            job.stop(now=True)
        replace(course_of(job), beat=time.time() - 1000).write(job.folder)
        assert job.status().state == "lost"
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_processes_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "boot", lambda: "")
    job = submit(FAMILY)
    until(lambda: len(list(job.lines())) == 2)
    found = family(str(job.folder))
    assert len(found) == 3
    assert all(member.lives for member in found)
    assert not replace(found[0], started="17.0").signal(signal.SIGKILL)
    for member in found:
        assert member.signal(signal.SIGKILL)
    until(lambda: not any(member.lives for member in found))
    assert Process.of(2**22 + 1) is None


def test_a_run_may_start_a_job_that_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = submit(SLEEP, slots=("outer",))
    reach(outer, "running")
    monkeypatch.setenv("FINERY_JOB", str(outer.folder))
    inner = submit(WAIT, str(tmp_path / "go"), slots=("inner",))
    reach(inner, "running")
    outer.stop(now=True)
    (tmp_path / "go").touch()
    assert end(inner).state == "finished"
