"""The queue: a job has all of its devices or none, and overtakes nobody who waits for one of them.

Places in the queue and devices are locks on files. The kernel frees a lock when the last process that holds it has ended, however it ended:
the lock on a place is the supervisor's, the locks on devices are inherited by the run, so that they last as long as it does.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

from finery.errors import UserError


def lock(file: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file; returns whether that was possible, which it is where it waits."""
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"the folder of jobs knows no locks ({error.strerror}); FINERY_JOBS names a folder on another disk") from None
    return True


class Queue:
    """Who waits for which devices, and who has them; `root` is the folder of all jobs."""

    def __init__(self, root: Path) -> None:
        self.places = root / ".queue"
        self.slots = root / ".slots"
        for folder in (self.places, self.slots):
            folder.mkdir(mode=0o700, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One at a time looks at the queue or changes it; it never lasts."""
        file = os.open(self.slots / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            lock(file, wait=True)
            yield
        finally:
            os.close(file)

    def enter(self, job: str, created: float, slots: Sequence[str]) -> int:
        """Take a place, inside `locked`; returns the open file whose lock is the place, to be handed to the supervisor."""
        file = os.open(self.places / job, os.O_RDWR | os.O_CREAT, 0o600)
        lock(file, wait=True)
        os.write(file, json.dumps({"created": created, "slots": list(slots)}).encode())
        return file

    def leave(self, job: str) -> None:
        """Give the place up."""
        (self.places / job).unlink(missing_ok=True)

    def take(self, job: str, created: float, slots: Sequence[str]) -> tuple[list[int], list[str]]:
        """The open files whose locks are the devices, if it is this job's turn; else none, and the jobs that it waits for."""
        with self.locked():
            if ahead := [other for when, other, wanted in self._waiting(job) if (when, other) < (created, job) and wanted & set(slots)]:
                return [], ahead
            taken, holders = self._try(slots)
            if holders:
                for file in taken:
                    os.close(file)
                return [], holders
            for file in taken:
                os.ftruncate(file, 0)
                os.pwrite(file, job.encode(), 0)
            self.leave(job)
            return taken, []

    def _try(self, slots: Sequence[str]) -> tuple[list[int], list[str]]:
        taken, holders = [], []
        for slot in slots:
            # the folder may lie on a disk that many machines share, their devices do not
            file = os.open(self.slots / f"{gethostname()}.{slot}", os.O_RDWR | os.O_CREAT, 0o600)
            if lock(file):
                taken.append(file)
            else:
                holders.append(os.pread(file, 100, 0).decode())
                os.close(file)
        return taken, list(dict.fromkeys(holders))

    def _waiting(self, job: str) -> Iterator[tuple[float, str, set[str]]]:
        """The others in the queue in their order; places whose supervisor has ended are cleared away."""
        found = []
        for path in self.places.iterdir():
            if path.name == job:
                continue
            try:
                file = os.open(path, os.O_RDWR)
            except FileNotFoundError:  # who is stopped leaves at any time
                continue
            try:
                if lock(file):
                    path.unlink(missing_ok=True)
                else:
                    place = json.loads(os.pread(file, 1 << 16, 0))
                    found.append((place["created"], path.name, set(place["slots"])))
            finally:
                os.close(file)
        yield from sorted(found, key=lambda place: place[:2])
