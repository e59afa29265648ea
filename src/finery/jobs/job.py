"""A job as its files tell it: anybody may look, at any time, from any process; only its supervisor writes down how it goes."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from finery.errors import UserError
from finery.files import replace_text
from finery.jobs.output import Output
from finery.jobs.process import Process, family

State = Literal["queued", "running", "stopping", "finished", "failed", "stopped", "lost"]
ENDED = ("finished", "failed", "stopped", "lost")
BEAT_SECONDS = 2.0
_SILENT_SECONDS = 60.0  # so long after its last beat, a supervisor on another machine counts as ended
_POLL_SECONDS = 0.25
_KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Course:
    """How a job has gone so far; its supervisor writes it, every few seconds anew."""

    supervisor: Process
    run: Process | None = None
    waits_for: list[str] = field(default_factory=list)
    began: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    beat: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> "Course | None":
        """What was written last; nothing where the supervisor has not written yet."""
        try:
            told = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        told |= {name: Process(**told[name]) for name in ("supervisor", "run") if told[name]}
        return cls(**told)

    def write(self, folder: Path) -> None:
        """Put it in the place of what was written before, whole."""
        replace_text(folder / "status.json", json.dumps(asdict(self)))

    def lives(self, process: Process | None) -> bool:
        """Whether the supervisor or the run is at work; on another machine, the last beat tells."""
        if process is None or process.is_here:
            return process is not None and process.lives
        return time.time() - self.beat < _SILENT_SECONDS


@dataclass(frozen=True)
class Progress:
    """The last line of the run's own log."""

    step: int
    total: int
    loss: float | None = None
    remaining: str = ""


@dataclass(frozen=True)
class Status:
    """Where a job stands; `why` says in words what the state alone does not."""

    state: State
    why: str = ""
    pid: int | None = None
    began: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    waits_for: list[str] = field(default_factory=list)
    progress: Progress | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self.state in ENDED


@dataclass(frozen=True)
class Job:
    """A run as a process of its own, with a folder of its own."""

    folder: Path
    words: list[str]
    command: list[str]
    cwd: str
    output_dir: str | None
    slots: list[str]
    name: str | None
    created: float

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """The job in a folder."""
        return cls(folder=folder, **json.loads((folder / "job.json").read_text(encoding="utf-8")))

    def write(self) -> None:
        """Say in its folder what the job is; it stays so."""
        told = {name: value for name, value in asdict(self).items() if name != "folder"}
        replace_text(self.folder / "job.json", json.dumps(told, ensure_ascii=False, indent=1))

    @cached_property
    def id(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def stop_file(self) -> Path:
        """There as soon as somebody has asked for the job to stop."""
        return self.folder / "stop"

    def status(self) -> Status:
        """Where the job stands now."""
        course = Course.read(self.folder)
        if course is None:
            late = time.time() - self.created > _SILENT_SECONDS
            return Status("lost", "it was never begun") if late else Status("queued")
        state, why = self._state(course)
        began, run = course.began, course.run
        return Status(
            state=state,
            why=why,
            pid=run.pid if run else None,
            began=began,
            ended=course.ended,
            exit_code=course.exit_code,
            waits_for=course.waits_for if state == "queued" else [],
            progress=self._progress(began) if began else None,
        )

    def _state(self, course: Course) -> tuple[State, str]:
        asked = self.stop_file.exists() and self.stop_file.stat().st_mtime <= (course.ended or time.time())
        if course.ended:
            return _end(course.exit_code, asked)
        supervised = course.lives(course.supervisor)
        if course.run is None:
            if supervised:
                return ("stopping" if asked else "queued"), ""
            return ("stopped", "") if asked else ("lost", f"its supervisor has ended before the run began{_restart(course)}")
        if supervised or course.lives(course.run):
            return ("stopping" if asked else "running"), "" if supervised else "its supervisor has ended: the exit code will not be known"
        if asked:
            return "stopped", ""
        if self._has_results(course.began or 0.0):
            return "finished", "as its results say; the exit code is not known"
        return "lost", f"it has ended, and nobody saw how{_restart(course)}"

    def _has_results(self, began: float) -> bool:
        """Whether the run has written what it writes at its end."""
        path = self._of_run("all_results.json")
        return path is not None and path.stat().st_mtime >= began

    def _progress(self, began: float) -> Progress | None:
        path = self._of_run("trainer_log.jsonl")
        if path is None or path.stat().st_mtime < began:  # an earlier run's
            return None
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            lines = [line for text in file.read().splitlines() if (line := _object(text))]
        if not lines:
            return None
        last, loss = lines[-1], next((line["loss"] for line in reversed(lines) if "loss" in line), None)
        return Progress(last["current_steps"], last["total_steps"], loss, last.get("remaining_time", ""))

    def _of_run(self, name: str) -> Path | None:
        path = Path(self.cwd) / self.output_dir / name if self.output_dir else None
        return path if path and path.is_file() else None

    def lines(self, *, follow: bool = False, last: int | None = None) -> Iterator[str]:
        """What the run has printed, all that is kept or the last lines; one that follows goes on until the job has ended."""
        output = Output(self.folder)
        place = output.first() if last is None else output.tail(last)
        rest = b""
        while True:
            ends = not follow or self.status().has_ended  # asked first: all that was printed until then is read below
            while (piece := output.read(place)).data:
                if piece.place > place:
                    yield f"({piece.place - place:,} bytes are no longer kept)"
                place = piece.place + len(piece.data)
                *whole, rest = (rest + piece.data).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in whole)
            if ends:
                break
            time.sleep(_POLL_SECONDS)
        if rest:
            yield rest.decode("utf-8", "replace")

    def stop(self, *, now: bool = False) -> None:
        """Ask the run to end as it does on SIGTERM, or take the job out of the queue; `now` kills all of its processes instead.

        It does not wait for a run that may still save: `status` tells. Raises `UserError` where there is nothing to stop.
        """
        status, course = self.status(), Course.read(self.folder)
        if now and status.has_ended and family(str(self.folder)):  # what a run has left behind where its supervisor is gone too
            self._kill()
            return
        if status.has_ended or course is None:
            raise UserError(f"job {self.id} does not run: it is {status.state}")
        process = course.run or course.supervisor
        if not process.is_here:
            raise UserError(f"job {self.id} runs on {process.host}; stop it there")
        again = self.stop_file.exists()
        self.stop_file.touch(0o600)
        if now:
            self._kill()
        elif course.run and (again or not course.supervisor.lives):  # else the supervisor does it, once
            course.run.signal(signal.SIGTERM)

    def _kill(self) -> None:
        """Kill until nothing of the job is left; its supervisor lives and writes down the end."""
        until = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < until:
            course = Course.read(self.folder)  # a queued job may begin at this moment
            members = family(str(self.folder), course.run if course else None)
            for member in members:
                member.signal(signal.SIGKILL)
            if not members and self.status().has_ended:
                return
            time.sleep(0.05)

    def remove(self) -> None:
        """Delete the job's own folder; what the run has written elsewhere stays. Raises `UserError` while it runs."""
        status = self.status()
        if not status.has_ended or family(str(self.folder)):
            raise UserError(f"job {self.id} is {status.state if not status.has_ended else 'not quite over'}; stop it first")
        gone = self.folder.with_name(f".{self.id}.{os.getpid()}")
        self.folder.rename(gone)  # at once, then in peace
        shutil.rmtree(gone)

    def as_dict(self) -> dict[str, Any]:
        """The job and its status in one flat object, for programs."""
        told = {"id": self.id, **asdict(self), "folder": str(self.folder), **asdict(self.status())}
        return {**told, **(told.pop("progress") or dict.fromkeys(field.name for field in fields(Progress)))}


def _end(exit_code: int | None, asked: bool) -> tuple[State, str]:
    """What an exit code means; none is that of a job which never began."""
    if asked and exit_code in (None, 0, -signal.SIGTERM, -signal.SIGKILL):
        return "stopped", "it was killed" if exit_code == -signal.SIGKILL else ""
    if exit_code == 0:
        return "finished", ""
    if exit_code is None:
        return "stopped", "its supervisor was told to end"
    if exit_code < 0:
        memory = "; perhaps there was too little memory" if exit_code == -signal.SIGKILL else ""
        return "failed", f"killed by signal {-exit_code} ({signal.Signals(-exit_code).name}){memory}"
    return "failed", f"exit code {exit_code}"


def _restart(course: Course) -> str:
    process = course.supervisor
    now = Process.of(os.getpid())
    return ": the machine was started anew" if now and process.is_here and process.boot != now.boot else ""


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:  # the first line may be cut, the last not yet written
        return None
    return found if isinstance(found, dict) and "current_steps" in found else None
