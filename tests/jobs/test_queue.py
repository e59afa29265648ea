"""The queue: a line for each device, which nobody jumps and no death blocks."""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from background import FAMILY, SLEEP, WAIT, course_of, end, own_jobs, reach, submit, until
from finery import jobs
from finery.errors import UserError
from finery.jobs import Job, Order
from finery.jobs.process import family
from finery.run import Run


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of jobs for each test."""
    with own_jobs(tmp_path / "jobs", monkeypatch) as folder:
        yield folder


def test_what_cannot_be_submitted_leaves_nothing(root: Path) -> None:
    def fail(folder: Path) -> list[str]:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        jobs.submit(Order([], Path.cwd(), ["one"]), fail)
    assert not jobs.jobs()
    assert not list((root / ".queue").iterdir())
    assert end(submit("print('the next one runs')")).state == "finished"


def test_the_queue_is_one_line_for_each_device(tmp_path: Path) -> None:
    """Nobody overtakes who waits for the same device, and nobody waits for another's."""
    go = tmp_path / "go"
    first = submit(WAIT, str(go), slots=("0",))
    reach(first, "running")
    both = submit("import time; time.sleep(0.5)", slots=("0", "1"))
    late = submit("pass", slots=("1",))
    beside = submit("pass", slots=("2",))
    assert end(beside).state == "finished"
    assert first.status().state == "running"
    assert both.status().state == late.status().state == "queued"
    until(lambda: both.status().waits_for == [first.id])
    until(lambda: late.status().waits_for == [both.id])
    go.touch()
    times = [(status.began or 0, status.ended or 0) for status in map(end, (first, both, late))]
    assert times[0][1] <= times[1][0] < times[1][1] <= times[2][0]


def test_a_queued_job_is_taken_out() -> None:
    first = submit(SLEEP)
    second, third = submit("print('never')"), submit("print('third')")
    reach(first, "running")
    second.stop()
    assert end(second).state == "stopped"
    assert second.status().began is None
    with pytest.raises(UserError, match="does not run: it is stopped"):
        second.stop()
    first.stop()
    assert end(first).state == "stopped"
    assert end(third).state == "finished"
    assert list(second.lines()) == []


def test_who_dies_in_the_queue_frees_the_place(tmp_path: Path) -> None:
    first = submit(WAIT, str(tmp_path / "go"))
    second, third = submit("pass"), submit("pass")
    course_of(second).supervisor.signal(signal.SIGKILL)
    status = reach(second, "lost")
    assert "before the run began" in status.why
    (tmp_path / "go").touch()
    assert end(third).state == "finished"
    assert first.status().state == "finished"


def test_what_a_run_leaves_behind_is_ended_before_the_next_begins() -> None:
    job, following = submit(FAMILY, "leave"), submit("pass")
    until(lambda: len(list(job.lines())) == 2)
    left = family(str(job.folder))
    status = end(following)
    assert job.status().state == "finished"
    assert not any(member.lives for member in left)
    assert (status.began or 0) > (job.status().ended or 0)


def test_ids_are_unique_however_many_come_at_once() -> None:
    found: list[Job] = []
    threads = [threading.Thread(target=lambda n=n: found.append(submit("pass", slots=(str(n),)))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.id for job in found}) == 6
    assert [job.id for job in jobs.jobs()] == sorted(job.id for job in found)
    for job in found:
        assert end(job).state == "finished"


@pytest.mark.parametrize(
    ("visible", "number", "slots"),
    [
        (None, 0, ["cpu"]),
        (None, 2, ["gpu0", "gpu1"]),
        ("3", 1, ["gpu3"]),
        ("1, 0", 2, ["gpu1", "gpu0"]),
        ("0,1,-1,2", 2, ["gpu0", "gpu1"]),
        ("GPU-bb", 1, ["gpu1"]),
        ("MIG-GPU-x/1/2", 1, ["gpuMIG-GPU-x-1-2"]),
    ],
)
def test_what_a_run_occupies(
    keys: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, visible: str | None, number: int, slots: list[str]
) -> None:
    monkeypatch.setattr("finery.training.arguments.visible_devices", lambda: number)
    monkeypatch.setattr("finery.jobs._gpu_names", lambda: ["GPU-aa-1", "GPU-bb-2"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert jobs.device_slots(Run.from_dict(keys())) == slots
    assert jobs.device_slots(Run.from_dict(keys(use_cpu=True))) == ["cpu"]
