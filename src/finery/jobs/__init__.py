"""Runs as processes of their own: started, listed, followed, stopped and removed, by the shell and by a page alike.

All that is known of a job stands in its folder, so that any number of processes may look, come and go.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finery.errors import UserError

if sys.platform == "win32":
    raise UserError("jobs need Linux or macOS; on Windows, WSL is a Linux")

from finery.jobs.job import ENDED, Job, Progress, Status
from finery.jobs.output import Output
from finery.jobs.process import MARK
from finery.jobs.queue import Queue

if TYPE_CHECKING:
    from finery.run import Run

__all__ = ["ENDED", "Job", "Order", "Progress", "Status", "find", "jobs", "jobs_folder", "start", "submit"]

_NAME = re.compile(r"[A-Za-z][\w.-]*")
_NUM_TOLD = 10


def jobs_folder() -> Path:
    """Where jobs have their folders: `FINERY_JOBS`, else a folder in the user's state folder; for the user's own eyes."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    folder = Path(os.environ.get("FINERY_JOBS") or state / "finery" / "jobs").expanduser().absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of jobs {folder} cannot be made ({error.strerror}); FINERY_JOBS names another") from None
    return folder


def start(words: Sequence[str], cwd: Path, name: str | None = None, verb: Literal["train", "export"] = "train") -> Job:
    """Check the run that `finery train WORDS` would be in the folder `cwd`, and start it, or queue it until its devices are free.

    Raises `UserError` for what the command would complain of; then there is no job. This process stands in `cwd` while it looks.
    """
    from finery.jobs.given import Given
    from finery.run import Run

    _check_name(name)
    with chdir(cwd):
        run = Run.read(words, trains=verb == "train")
    given = Given.read(words, cwd)
    folder = str(run.folder) if verb == "train" else run.export.export_dir
    order = Order(given.words, cwd.absolute(), device_slots(run) if verb == "train" else ["cpu"], folder, name, given.secrets)
    # -P: what lies in the user's folder is data, not modules
    return submit(order, lambda folder: [sys.executable, "-P", "-m", "finery", verb, *given.put(folder)])


@dataclass(frozen=True)
class Order:
    """What a job is to be: all but its command, which may name files in the job's own folder."""

    words: Sequence[str]
    cwd: Path
    slots: Sequence[str]
    output_dir: str | None = None
    name: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)  # variables for the run alone, written down nowhere


def submit(order: Order, command: Callable[[Path], list[str]]) -> Job:
    """Make a job's folder, take a place in the queue and leave both to a supervisor; returns when that is at work."""
    root = jobs_folder()
    queue = Queue(root)
    with queue.locked():
        folder, created = _new_folder(root), time.time()
        place = queue.enter(folder.name, created, order.slots)
    started = False
    try:
        job = Job(
            folder=folder,
            words=list(order.words),
            command=command(folder),
            cwd=str(order.cwd),
            output_dir=order.output_dir,
            slots=list(order.slots),
            name=order.name,
            created=created,
        )
        job.write()
        _supervise(job, place, {**os.environ, **order.secrets})
        started = True
        return job
    finally:
        os.close(place)
        if not started:
            queue.leave(folder.name)
            shutil.rmtree(folder)


def _supervise(job: Job, place: int, environment: dict[str, str]) -> None:
    environment.pop(MARK, None)  # a run may start a job: that one is not a part of it
    Output(job.folder).create()
    output = Output(job.folder).open()
    command = [sys.executable, "-P", "-m", "finery.jobs.supervisor", str(job.folder)]
    try:
        first = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, pass_fds=[place]
        )
        if first.wait():
            raise RuntimeError(f"the supervisor of job {job.id} has not come up: {' | '.join(job.lines(last=5))}")
    finally:
        os.close(output)


def _new_folder(root: Path) -> Path:
    """A folder named by the time of day; of several in a second, the later ones get the seconds after it."""
    moment = time.time()
    while True:
        folder = root / time.strftime("%y%m%d-%H%M%S", time.localtime(moment))
        try:
            folder.mkdir(mode=0o700)
            return folder
        except FileExistsError:
            moment += 1


def _check_name(name: str | None) -> None:
    if name is not None and (not _NAME.fullmatch(name) or name == "last"):
        raise UserError(f"the name of a job begins with a letter and holds letters, digits, '_', '.' and '-'; found {name!r}")


def device_slots(run: "Run") -> list[str]:
    """What a run occupies: every GPU that it sees, by its number (or its name, where that is all that is known), else `cpu`."""
    from finery.training.arguments import visible_devices

    number = 0 if run.trainer.get("use_cpu") else visible_devices()
    if not number:
        return ["cpu"]
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    known = [] if all(part.isdigit() for part in named) else _gpu_names()
    numbers = [next((str(place) for place, full in enumerate(known) if full.startswith(part)), part) for part in named[:number]]
    return [f"gpu{part}".replace("/", "-") for part in numbers or range(number)]


def _gpu_names() -> list[str]:
    """The unique names of the GPUs of this machine, in the order of their numbers."""
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU \d+: .*\(UUID: ([^)]+)\)", told, re.M)


def jobs() -> list[Job]:
    """Every job there is, the oldest first."""
    found = []
    for folder in jobs_folder().iterdir():
        try:
            found.append(Job.read(folder))
        except (FileNotFoundError, NotADirectoryError):  # one that is being made or removed, or a folder of ours
            continue
    return sorted(found, key=lambda job: (job.created, job.id))


def find(text: str) -> Job:
    """The job of this id or name (of several, the newest), the one whose id begins or ends so, or the `last`; raises `UserError`."""
    every = jobs()
    if text == "last" and every:
        return every[-1]
    for matching in (
        [job for job in every if job.id == text],
        [job for job in every if job.name == text][-1:],
        [job for job in every if text and (job.id.startswith(text) or job.id.endswith(text))],
    ):
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise UserError(f"{text!r} may be any of {_told(matching)}; give more of the id")
    raise UserError(f"there is no job {text!r}; " + (f"there are: {_told(every)}" if every else "there are none at all"))


def _told(some: Sequence[Job]) -> str:
    told = [f"{job.id} ({job.name})" if job.name else job.id for job in some[-_NUM_TOLD:]]
    return ", ".join(["…", *told] if len(some) > _NUM_TOLD else told)
