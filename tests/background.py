"""Jobs that are a few lines of Python, and waiting for what becomes of them; all that is started here is ended here."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finery import jobs
from finery.jobs import Job, Order, Status
from finery.jobs.job import Course
from finery.jobs.process import family

SLEEP = "import time; time.sleep(600)"
WAIT = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1]).exists(): time.sleep(0.05)
"""
"""Works until there is the file that its first word names: tests hold on a busy machine too."""
FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
alone = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); "
alone += "os.close(int(sys.argv[1])); time.sleep(600)"
up, tell = os.pipe()
for new_session in (False, True):
    subprocess.Popen([sys.executable, "-c", alone, str(tell)], start_new_session=new_session, pass_fds=[tell])
os.close(tell)
os.read(up, 1)  # nothing comes: it ends when both have said that they are up
if len(sys.argv) > 1: raise SystemExit(0)
time.sleep(600)
"""
"""Three processes that do not hear a stop, one of them in a session of its own; told to `leave`, the first does, as soon as the
others are up: what it leaves behind has only seconds."""


@contextmanager
def own_jobs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of jobs; what still runs in it at the end is ended."""
    monkeypatch.setenv("FINERY_JOBS", str(folder))
    yield folder
    monkeypatch.setenv("FINERY_JOBS", str(folder))
    for job in jobs.jobs():
        course = Course.read(job.folder)
        if course and course.supervisor.is_here:
            course.supervisor.signal(signal.SIGKILL)
        for member in family(str(job.folder)):
            member.signal(signal.SIGKILL)


def submit(code: str, *words: str, slots: tuple[str, ...] = ("one",), cwd: Path | None = None, **order: Any) -> Job:
    """A job that is a few lines of Python."""
    command = [sys.executable, "-c", code, *words]
    return jobs.submit(Order(words, cwd or Path.cwd(), slots, **order), lambda folder: command)


def until(holds: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it has not come about in time"
        time.sleep(0.05)
    return found


def reach(job: Job, *states: str) -> Status:
    """Its status, as soon as it is one of these."""
    return until(lambda: status if (status := job.status()).state in states else None)


def end(job: Job) -> Status:
    return until(lambda: status if (status := job.status()).has_ended else None)


def course_of(job: Job) -> Course:
    course = Course.read(job.folder)
    assert course
    return course
