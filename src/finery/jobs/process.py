"""Processes known by more than their number: one that the kernel has given to another since is never taken for them."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from socket import gethostname
from typing import NamedTuple

PROC = Path("/proc")
MARK = "FINERY_JOB"
"""The variable that every process of a job inherits; it holds the job's folder."""


class Seen(NamedTuple):
    """What the kernel tells of a process."""

    parent: int
    group: int
    session: int
    started: str
    has_ended: bool  # a zombie: nobody has asked for its exit code yet


@dataclass(frozen=True)
class Process:
    """A process, by its number and the time at which the kernel started it."""

    pid: int
    started: str
    boot: str
    host: str

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process that has this number now."""
        seen = look(pid)
        return cls(pid, seen.started, boot(), gethostname()) if seen else None

    @property
    def is_here(self) -> bool:
        """Whether it is or was a process of this machine."""
        return self.host == gethostname()

    @property
    def lives(self) -> bool:
        """Whether this very process is at work on this machine."""
        if not self.is_here or self.boot != boot():
            return False
        seen = look(self.pid)
        return seen is not None and seen.started == self.started and not seen.has_ended

    def signal(self, number: int) -> bool:
        """Send a signal to this very process; returns whether it was there."""
        with _held(self.pid) as handle:
            if not self.lives:
                return False
            try:
                if sys.platform == "linux" and handle is not None:
                    signal.pidfd_send_signal(handle, number)
                else:
                    os.kill(self.pid, number)
            except ProcessLookupError:
                return False
            return True


@contextmanager
def _held(pid: int) -> Iterator[int | None]:
    """A file that stands for a process, so that its number means one process as long as it is open; none where the kernel has none."""
    handle = None
    if sys.platform == "linux":
        with suppress(OSError):  # there is no such process, or the kernel is older than 5.3
            handle = os.pidfd_open(pid)
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


@cache
def boot() -> str:
    """Which start of this machine counts the ticks; empty where times of day are told instead."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def look(pid: int) -> Seen | None:
    """What is known of the process with this number; nothing where there is none."""
    if not boot():
        return _look_without_proc(pid)
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # a name may hold blanks and brackets
    state, parent, group, session = fields[0], int(fields[1]), int(fields[2]), int(fields[3])
    return Seen(parent, group, session, fields[19], state in "ZX")


def _look_without_proc(pid: int) -> Seen | None:
    import psutil

    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return Seen(process.ppid(), os.getpgid(pid), os.getsid(pid), repr(process.create_time()), ended)
    except (psutil.Error, OSError):
        return None


def _numbers() -> Iterator[int]:
    if boot():
        yield from (int(path.name) for path in PROC.iterdir() if path.name.isdigit())
    else:
        import psutil

        yield from psutil.pids()


def _bears(pid: int, mark: str) -> bool:
    """Whether a process was started with this mark; those of other users do not tell."""
    if boot():
        try:
            environment = (PROC / str(pid) / "environ").read_bytes()
        except OSError:
            return False
        return os.fsencode(f"{MARK}={mark}") in environment.split(b"\0")
    import psutil

    try:
        return psutil.Process(pid).environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False


def family(mark: str, leader: Process | None = None) -> list[Process]:
    """Every live process of a job: what bears its mark, what is in its leader's session or group, and what those have started.

    Ranks that torchrun has started are in sessions of their own, and outlive it where it is killed: the mark finds them.
    """
    seen = {pid: found for pid in _numbers() if (found := look(pid)) and not found.has_ended}
    number = leader.pid if leader and leader.lives else None  # else the number may be a stranger's
    mine = {pid for pid, found in seen.items() if number in (found.session, found.group) or _bears(pid, mark)}
    while more := {pid for pid, found in seen.items() if found.parent in mine} - mine:
        mine |= more
    mine.discard(os.getpid())
    return [Process(pid, seen[pid].started, boot(), gethostname()) for pid in sorted(mine)]
