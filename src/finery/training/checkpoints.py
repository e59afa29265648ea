"""Checkpoints that are whole or not there: written beside, synced to the disk, then renamed; damage is found before they are used."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finery.files import digest_of_file, sync
from finery.log import get_logger

log = get_logger(__name__)

COMPLETE = "complete.json"
"""Written last into a checkpoint: its step, whether a run can go on with it, and the size and digest of every file."""
NAME = "checkpoint-{}"
BESIDE, REPLACED, GOING = ".{}.part", ".{}.replaced", ".{}.going"
"""What a checkpoint is called while it is written, while a newer one of the same step takes its place, and while it is deleted."""
MARGIN_BYTES = 2 * 2**20
"""Room beside the weights and states for a tokenizer and small files."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    resumable: bool  # holds the optimizer's state, too
    files: dict[str, dict[str, Any]]

    def damage(self, deep: bool = True) -> str:
        """What is wrong with its files, or nothing; `deep` reads them all."""
        for name, told in self.files.items():
            path = self.folder / name
            try:
                size = path.stat().st_size
                if size != told["bytes"]:
                    return f"{path} has {size:,} bytes and should have {told['bytes']:,}"
                if deep and digest_of_file(path) != told["digest"]:
                    return f"{path} has other content than was written"
            except OSError as error:
                return f"{path} cannot be read: {error.strerror}"
        return ""


def read(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder, if it is complete as far as names and sizes tell."""
    try:
        told = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        found = Checkpoint(folder, told["step"], told["resumable"], told["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if found.damage(deep=False) else found


def listed(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in an output folder, the oldest first."""
    found = [read(path) for path in folder.glob(NAME.format("[0-9]*")) if path.is_dir()]
    return sorted((one for one in found if one is not None), key=lambda one: one.step)


def newest(folder: Path) -> Checkpoint | None:
    """The newest that a run can go on with and whose files are what was written; damaged ones are passed over with a word."""
    for one in reversed([one for one in listed(folder) if one.resumable]):
        if not (damage := one.damage()):
            return one
        log.warning("%s is damaged and is passed over: %s", one.folder, damage)
    return None


def tidy(folder: Path) -> None:
    """Clear away what was interrupted: half-written and half-deleted checkpoints; one that was about to be replaced is put back."""
    for path in sorted(folder.glob(REPLACED.format(NAME.format("*")))):
        own = folder / path.name.removeprefix(".").removesuffix(".replaced")
        if not own.exists():
            path.replace(own)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder.glob(BESIDE.format(NAME.format("*")))):
        log.warning("%s was interrupted while it was written, and is removed", path.name.removeprefix(".").removesuffix(".part"))
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(GOING.format(NAME.format("*"))):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder.glob(NAME.format("[0-9]*"))):
        if path.is_dir() and read(path) is None:
            log.warning("%s is not complete (no %s that fits it): it is neither gone on with nor counted", path, COMPLETE)


def set_aside(folder: Path, step: int) -> None:
    """Checkpoints of steps after `step`, with which a run goes on, are no longer of its course: they are kept under another name."""
    for one in [one for one in listed(folder) if one.step > step]:
        other = folder / f"before-{one.folder.name}"
        shutil.rmtree(other, ignore_errors=True)
        one.folder.replace(other)
        log.warning("%s is beyond step %d, with which the run goes on: it is kept as %s", one.folder, step, other.name)


class NoRoom(OSError):
    """The disk has less room than a checkpoint needs."""


def is_disk_trouble(error: BaseException) -> bool:
    """Whether a disk or a mount is at fault; tokenizers tell it in a plain exception's words alone."""
    return isinstance(error, (OSError, SafetensorError)) or "os error" in str(error)


def beside(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is complete."""
    return folder / BESIDE.format(NAME.format(step))


def begin(folder: Path, step: int, num_bytes: int) -> None:
    """An empty folder to write into. Raises `OSError` where that cannot be had, `NoRoom` where less than `num_bytes` are free."""
    if not folder.exists():
        log.warning("%s is gone: it is made anew", folder)
    path = beside(folder, step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes + MARGIN_BYTES:
        raise NoRoom(f"it needs some {num_bytes / 2**20:,.0f} MB and {free / 2**20:,.0f} MB are free")


def finish(folder: Path, step: int, resumable: bool) -> Path:
    """What was written becomes the checkpoint of a step: synced, listed with digests, and renamed; returns its folder."""
    path, final = beside(folder, step), folder / NAME.format(step)
    files = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
    for file in files.values():
        sync(file)
    told = {name: {"bytes": file.stat().st_size, "digest": digest_of_file(file)} for name, file in files.items()}
    marker = {"step": step, "resumable": resumable, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "files": told}
    (path / COMPLETE).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    sync(path / COMPLETE)
    sync(path)
    old = folder / REPLACED.format(NAME.format(step))
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.replace(old)
    path.replace(final)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def give_up(folder: Path, step: int) -> None:
    """Leave nothing of a checkpoint that could not be written."""
    shutil.rmtree(beside(folder, step), ignore_errors=True)


def rotate(folder: Path, limit: int | None, best: str | None, step: int) -> None:
    """Delete the oldest complete checkpoints beyond `limit`; never that of `step`, which was just written, nor the `best`."""
    if limit is None:
        return
    found = listed(folder)
    spared = {NAME.format(step), Path(best).name if best else ""}
    for one in [one for one in found if one.folder.name not in spared][: max(len(found) - limit, 0)]:
        going = folder / GOING.format(one.folder.name)
        with contextlib.suppress(OSError):  # the next one tries again
            one.folder.replace(going)
            shutil.rmtree(going, ignore_errors=True)


@contextlib.contextmanager
def swapped_in(folder: Path, last: str) -> Iterator[Path]:
    """A folder to fill beside `folder`'s files; they are moved there one by one, synced, `last` (by name) after all others.

    Whoever sees `last` sees all of them. Weights go before other files, so that an index never names a shard that is not there.
    """
    path = folder / ".final.part"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
        files = sorted(path.rglob("*"), key=lambda file: (file.name == last, file.suffix != ".safetensors", file.name))
        for file in (file for file in files if file.is_file()):
            sync(file)
            target = folder / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        sync(folder)
    finally:
        shutil.rmtree(path, ignore_errors=True)
