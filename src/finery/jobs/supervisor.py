"""The process that stays with a job: it waits for the devices, starts the run, keeps its output short and writes down how it ends.

It holds nothing that the run needs: where it is killed, the run goes on.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from finery.jobs.job import BEAT_SECONDS, Course, Job
from finery.jobs.output import Output
from finery.jobs.process import MARK, Process, family
from finery.jobs.queue import Queue

_POLL_SECONDS = 0.25
_GRACE_SECONDS = 3.0
_NUM_TRIES = 30


class Supervisor:
    """Sees one job through."""

    def __init__(self, folder: Path) -> None:
        self.job = Job.read(folder)
        self.output = Output(folder)
        own = Process.of(os.getpid())
        assert own is not None
        self.course = Course(own)
        self.dismissed = False
        # those who end a session or a machine tell every process: the run hears it too, and its end is still to be written down
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._dismiss)

    def _dismiss(self, number: int, frame: FrameType | None) -> None:
        self.dismissed = True

    def tell(self, **changes: object) -> bool:
        """Write down what is new and that the supervisor is there; returns whether the disk took it."""
        self.course = replace(self.course, beat=time.time(), **changes)  # type: ignore[arg-type]
        try:
            self.course.write(self.job.folder)
        except OSError:  # full, perhaps: the run may be luckier than its supervisor
            return False
        return True

    def work(self) -> None:
        """From the queue to the end."""
        devices = self._wait()
        if devices:
            self._finish(self._run(devices))
        else:
            Queue(self.job.folder.parent).leave(self.job.id)
            self._finish(None)

    def _wait(self) -> list[int]:
        """The devices, as open files; none where the job is to stop before it has begun."""
        queue = Queue(self.job.folder.parent)
        while not self.dismissed and not self.job.stop_file.exists():
            devices, waits_for = queue.take(self.job.id, self.job.created, self.job.slots)
            if devices:
                return devices
            if waits_for != self.course.waits_for or time.time() - self.course.beat > BEAT_SECONDS:
                self.tell(waits_for=waits_for)
            time.sleep(_POLL_SECONDS)
        return []

    def _run(self, devices: Sequence[int]) -> int:
        """The run's exit code."""
        output = self.output.open()
        environment = {"PYTHONUNBUFFERED": "1", **os.environ, MARK: str(self.job.folder)}
        try:
            run = subprocess.Popen(
                self.job.command,
                cwd=self.job.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=devices,
            )
        except OSError as error:
            os.write(output, f"error: the run cannot be started: {error}\n".encode())
            self.tell(began=time.time())
            return 127
        finally:
            os.close(output)
        self.tell(run=Process.of(run.pid), began=time.time(), waits_for=[])
        return self._watch(run)

    def _watch(self, run: subprocess.Popen[bytes]) -> int:
        told = False
        while (code := run.poll()) is None:
            if not told and self.job.stop_file.exists():
                run.send_signal(signal.SIGTERM)
                told = True
            if time.time() - self.course.beat > BEAT_SECONDS:
                self.tell()
                self._rotate()
            time.sleep(_POLL_SECONDS)
        return code

    def _rotate(self) -> None:
        try:
            self.output.rotate()
        except OSError as error:  # a full disk: what is there stays as it is
            print(f"warning: the output is not rotated: {error}", file=sys.stderr, flush=True)

    def _finish(self, exit_code: int | None) -> None:
        """Write the end down, then end what the run has left behind, which would go on holding its devices."""
        for _ in range(_NUM_TRIES):
            if self.tell(exit_code=exit_code, ended=time.time(), waits_for=[]):
                break
            time.sleep(BEAT_SECONDS)
        until = time.monotonic() + _GRACE_SECONDS
        while left := family(str(self.job.folder)):
            if time.monotonic() > until:
                for process in left:
                    process.signal(signal.SIGKILL)
            time.sleep(_POLL_SECONDS)


def main(folder: Path) -> None:
    """Leave whoever has started this process, and see the job through; the first process ends as soon as the job is under way."""
    told, tell = os.pipe()
    if os.fork():
        os.close(tell)
        os._exit(0 if os.read(told, 1) else 1)
    os.setsid()
    os.close(told)
    supervisor = Supervisor(folder)
    if supervisor.tell():
        os.write(tell, b"1")
        os.close(tell)
        supervisor.work()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
