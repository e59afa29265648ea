"""Files and folders: where caches lie, digests, and writes that are either whole or not there."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from finery.errors import UserError
from finery.log import get_logger

log = get_logger(__name__)


def cache_folder() -> Path:
    """Finery's own cache: `FINERY_CACHE`, else a folder in the user's cache folder; a temporary one where that cannot be written."""
    base = os.environ.get("FINERY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "finery"
    return _writable(Path(base).expanduser())


@cache
def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "it may not be written"
    except OSError as error:
        reason = str(error.strerror)
    if not reason:
        return folder
    other = Path(tempfile.gettempdir()) / f"finery-{os.getuid()}"
    log.warning("the cache %s cannot be used (%s): %s is; FINERY_CACHE names another folder", folder, reason, other)
    other.mkdir(mode=0o700, exist_ok=True)
    return other


def read_yaml(path: Path) -> Any:
    """What a YAML file of Finery's own holds, read by libyaml where that is there, ten times as fast: every start reads some."""
    import yaml

    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def digest(*parts: str | bytes | Path) -> str:
    """A name for content: blake2b over texts, bytes and the bytes of files, 32 hex digits."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        whole.update(len(content).to_bytes(8, "little"))
        whole.update(content)
    return whole.hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it takes the place of `path` only when the block ends well."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield beside
        if path.is_mount():  # it cannot be replaced, only filled
            for old in path.iterdir():
                old.unlink() if old.is_file() else shutil.rmtree(old)
            for new in beside.iterdir():
                shutil.move(new, path / new.name)
        else:
            shutil.rmtree(path, ignore_errors=True)
            beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def usual_modes(folder: Path) -> None:
    """Let weights be read by whoever may read the files beside them: safetensors 0.8 writes them for their owner alone."""
    others = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"]
    for path in folder.glob("*.safetensors"):
        if others:
            path.chmod(others[0].stat().st_mode)


def digest_of_file(path: Path) -> str:
    """blake2b of a file's bytes, 32 hex digits; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: Path) -> None:
    """Have the disk keep what was written to a file, or which names a folder holds."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, at any moment, finds the old text or the new."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
