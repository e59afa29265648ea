"""One run at a time in an output folder."""

import os
import socket
from pathlib import Path

from finery.errors import UserError
from finery.log import get_logger

log = get_logger(__name__)

FILE = ".lock"


class Lock:
    """Held until it is released, or until the process is gone, however it ended: the kernel sees to that. Forks do not share it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._file: int | None = None

    def take(self) -> None:
        """Raises `UserError` where another process has it; where a file system knows no locks, that is said and nothing is kept out."""
        try:
            import fcntl
        except ImportError:  # not a Unix
            return
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            told = os.read(file, 200).decode("utf-8", "replace").strip()
            os.close(file)
            raise UserError(f"'output_dir': another run is at work in {self.path.parent} ({told}); wait for it, or name another") from None
        except OSError as error:
            os.close(file)
            log.warning("%s cannot be locked (%s): see to it that no other run works there", self.path.parent, error.strerror)
            return
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
