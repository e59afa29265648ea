"""Files by content: a digest of their bytes, remembered by size, time and inode; and what was made of them once."""

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finery.errors import UserError
from finery.files import cache_folder, digest, new_folder
from finery.log import get_logger

log = get_logger(__name__)

CHUNK_BYTES = 1 << 24
"""How much of a file is held at a time."""
LOOK_SECONDS = 0.5
"""How often a process that waits for another's work looks again."""


def read_chunks(path: Path, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """A file, piece by piece; raises `UserError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(size):
                yield chunk
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def hash_file(path: Path) -> str:
    """xxh3 over the bytes of a file, 32 hex digits; not meant to withstand an enemy."""
    import xxhash

    whole = xxhash.xxh3_128()
    for chunk in read_chunks(path):
        whole.update(chunk)
    return whole.hexdigest()


def identify(path: Path, anew: bool = False) -> tuple[str, bool]:
    """The digest of a file's bytes, and whether it was remembered rather than computed now.

    It is remembered by path, size, time of change and inode; `anew` forgets that.
    """
    stamp = digest(str(path.resolve()), _stamp(path))
    note = cache_folder() / "files" / "seen" / f"{stamp}.json"
    if not anew:
        with suppress(OSError, ValueError, KeyError):
            return json.loads(note.read_text(encoding="utf-8"))["content"], True
    content = hash_file(path)
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        beside = note.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({"content": content, "path": str(path)}), encoding="utf-8")
        beside.replace(note)
    return content, False


def _stamp(path: Path) -> str:
    """By what a file is taken for unchanged."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def check_unchanged(path: Path, content: str) -> None:
    """Raise `UserError` where a file no longer is what it was read as; another time of change costs a look at its content."""
    if identify(path)[0] != content:
        raise UserError(f"{path} was changed while this run was reading it; start again")


class ContentGuard(threading.Thread):
    """Reads files whole beside the training and compares them with what they were taken for by size, time and inode."""

    def __init__(self, taken: dict[Path, str]) -> None:
        super().__init__(daemon=True, name="content guard")
        self.taken = taken
        self.stamps = {path: _stamp(path) for path in taken}
        self.problem = ""
        if taken:
            self.start()

    def run(self) -> None:
        """Hash one file after the other."""
        for path, content in self.taken.items():
            try:
                found, changed = hash_file(path), _stamp(path) != self.stamps[path]
            except UserError as error:
                self.problem = str(error)
                return
            if found != content and changed:
                self.problem = f"{path} was changed while this run was reading it; start again"
                return
            if found != content:
                identify(path, anew=True)
                self.problem = (
                    f"{path} was changed in a way that left its size, time and inode as they were, and this run began with the tokens of "
                    "its old content; what is remembered of it is mended now: start again"
                )
                return


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` among what is made of files, filled by `make` unless it is there.

    Other processes wait for the one that fills it.
    """
    folder = made_folder() / name
    if folder.is_dir():
        return folder
    with locked(folder.with_name(f"{name}.lock")):
        if not folder.is_dir():
            try:
                with new_folder(folder) as beside:
                    make(beside)
            except OSError as error:
                raise full_disk(error) or error from None
    return folder


def full_disk(error: OSError) -> UserError | None:
    """What to tell where the disk of the cache is full; nothing where `error` says something else."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    folder = cache_folder()
    return UserError(f"the disk that holds the cache {folder} is full; make room, or set FINERY_CACHE to a folder on another disk")


def made_folder() -> Path:
    """Where indexes and converted files lie."""
    return cache_folder() / "files"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes respect; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Rate:
    """Tells how fast something goes, every few seconds where it takes long, and at the end where it took long."""

    def __init__(self, doing: str, unit: str, total: float | None = None, patience_seconds: float = 3.0) -> None:
        self.doing = doing
        self.unit = unit
        self.total = total
        self.patience_seconds = patience_seconds
        self.began = self.told = time.monotonic()
        self.done = 0.0

    def add(self, amount: float) -> None:
        """So much more is done."""
        self.done += amount
        now = time.monotonic()
        if now - self.told >= self.patience_seconds:
            self.told = now
            of = f" of {self._text(self.total)}" if self.total else ""
            log.info("%s: %s%s, %s a second", self.doing, self._text(self.done), of, self._text(self.done / max(now - self.began, 1e-9)))

    def end(self) -> None:
        """Say what it took, where anybody had to wait for it."""
        seconds = time.monotonic() - self.began
        if seconds >= 1:
            log.info("%s: %s in %.1f s, %s a second", self.doing, self._text(self.done), seconds, self._text(self.done / seconds))

    def _text(self, amount: float | None) -> str:
        if self.unit == "bytes":
            return f"{(amount or 0) / 1e6:,.0f} MB"
        return f"{amount or 0:,.0f} {self.unit}"
