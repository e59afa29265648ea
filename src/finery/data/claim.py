"""Who may write a store: one process of one run; others of that run read what it writes, other runs have a store of their own."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from finery.errors import UserError
from finery.log import get_logger

log = get_logger(__name__)

_LOCK = "lock"
_LOOK_SECONDS = 0.1
_ORPHAN_SECONDS = 15.0
"""How long processes of a run that was killed may take to notice it."""
PATIENCE_SECONDS = 1800.0
"""How long a reader waits for the writer's preparations."""

_HELD: dict[Path, list[int]] = {}
"""Locks of this process by folder, and how often each was claimed: they end with the last claim, or with the process."""


def run_name() -> str:
    """The same for all processes of one run."""
    variables = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    return " ".join(os.environ[name] for name in variables) if all(name in os.environ for name in variables) else f"process {os.getpid()}"


def is_writer() -> bool:
    """Whether this process encodes for its run: the first of each machine does."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def claim(folder: Path, writes: bool, anew: bool, only_here: bool = False) -> Path:
    """The folder of a store, `folder` or one beside it where another run writes there just now.

    The writer holds it until its process ends; `anew` empties it first. Readers wait until the writer of their run has it.
    With `only_here` a folder that another run writes is refused with `UserError`.
    """
    candidates = [folder, *(folder.with_name(f"{folder.name}.{number}") for number in range(2, 100))]
    if not writes:
        return _find(candidates, folder)
    for candidate in candidates[: 1 if only_here else None]:
        if (lock := _lock(candidate)) is not None:
            if anew:
                _empty(candidate)
            # only now may readers of this run take what they find
            os.truncate(lock, 0)
            os.pwrite(lock, json.dumps({"run": run_name(), "pid": os.getpid()}).encode(), 0)
            return candidate
        if candidate == folder:
            log.info("another run is encoding the same data just now: this one does it for itself")
    raise UserError(f"{folder} is being written by another run; wait for its end or name another folder")


def _lock(folder: Path) -> int | None:
    """The held lock of a folder, or nothing where another run holds it."""
    if folder in _HELD:
        _HELD[folder][1] += 1
        return _HELD[folder][0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; FINERY_CACHE names another folder for it") from None
    until = time.monotonic() + _ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if _is_alive(folder) or time.monotonic() > until:
                os.close(descriptor)
                return None
            time.sleep(_LOOK_SECONDS)
        else:
            break
    os.truncate(descriptor, 0)
    _HELD[folder] = [descriptor, 1]
    return descriptor


def release(folder: Path) -> None:
    """Give a claim back, where this process holds one."""
    if folder in _HELD:
        _HELD[folder][1] -= 1
        if not _HELD[folder][1]:
            descriptor, _ = _HELD.pop(folder)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked since may have it open, too
            os.close(descriptor)


def _owner(folder: Path) -> dict:
    with suppress(OSError, ValueError):
        return json.loads((folder / _LOCK).read_text(encoding="utf-8"))
    return {}


def _is_alive(folder: Path) -> bool:
    """Whether the process that took the lock runs; its own helpers hold the lock for a moment after it was killed."""
    try:
        os.kill(int(_owner(folder).get("pid", 0)) or os.getpid(), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _find(candidates: list[Path], folder: Path) -> Path:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        for candidate in candidates:
            if not candidate.exists():
                break
            # an earlier run may have had the same name
            if _owner(candidate).get("run") == run_name() and _is_alive(candidate) and (candidate / "index.bin").exists():
                return candidate
        time.sleep(_LOOK_SECONDS)
    raise UserError(f"the process that encodes the data has not begun within {PATIENCE_SECONDS:.0f} seconds ({folder})")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _LOCK:
            path.unlink() if path.is_file() else shutil.rmtree(path)
