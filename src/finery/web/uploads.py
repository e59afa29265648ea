"""Files that a page's user sends: their names made safe, and none put in the place of another without being asked."""

from __future__ import annotations

import os
import re
import shutil
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from finery.data.files import METADATA, endings, kind_of
from finery.errors import UserError
from finery.web.catalogue import DataFolder

_MOST_BYTES = 180
"""Of a name: file systems take 255."""
_FOLDER = "GRADIO_TEMP_DIR"
_PREFIX = "finery-uploads-"
_HOUR = 3600


class Exists(UserError):
    """There is a file of that name."""


def safe_name(given: str) -> str:
    """A file's name without folders, control characters and dots at its start; raises `UserError` where nothing would read it."""
    plain = unicodedata.normalize("NFC", re.split(r"[/\\]", given)[-1])
    name = re.sub(r"[^\w.+() -]+", "_", plain).strip(" .")
    path = Path(name)
    if not kind_of(path):
        raise UserError(f"a file of data should end in one of {', '.join(endings())}, also with .gz or .zst; found {given[-80:]!r}")
    ending = "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix
    stem = name.removesuffix(ending).encode()[:_MOST_BYTES].decode(errors="ignore").strip(" .")
    if not stem:
        raise UserError(f"a file needs a name before its ending, found {given[-80:]!r}")
    if stem + ending in METADATA:
        raise UserError(f"{stem + ending} is no file of data: it says what the files are; change its entries here")
    return stem + ending


def take(folder: DataFolder, sent: Path, name: str, replaces: bool = False) -> Path:
    """Move a file that was sent into the folder. Raises `Exists` where there is one of that name, unless it `replaces` it."""
    home = folder.made()
    target = home / name
    beside = home / f".{name}.{os.getpid()}.{time.monotonic_ns()}"
    try:
        shutil.copyfile(sent, beside)
        if not replaces:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))  # nobody else has the name now; no link is followed
        beside.replace(target)
    except FileExistsError:
        raise Exists(f"there is a file {name} in {home} already") from None
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
    sent.unlink(missing_ok=True)
    return target


def free_name(folder: Path, name: str) -> str:
    """The name with the first number at which there is no such file."""
    stem, dot, ending = name.partition(".")
    return next(free for number in range(2, 10_000) if not os.path.lexists(folder / (free := f"{stem}-{number}{dot}{ending}")))


@contextmanager
def uploads_folder() -> Iterator[Path]:
    """Where Gradio keeps what is sent while it comes: a folder of this process, gone when that ends. Entered before a page is built."""
    before = os.environ.get(_FOLDER)
    for left in Path(before or gettempdir()).glob(f"{_PREFIX}*"):
        if _is_left(left):
            shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=before, ignore_cleanup_errors=True) as folder:
        os.environ[_FOLDER] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(_FOLDER)
            if before is not None:
                os.environ[_FOLDER] = before


def _is_left(folder: Path) -> bool:
    """Whether the process whose folder it was has ended without a chance to remove it."""
    number = folder.name.removeprefix(_PREFIX).partition("-")[0]
    try:
        if not number.isdecimal() or folder.lstat().st_uid != os.getuid():
            return False
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def sweep() -> None:
    """Remove what was sent an hour ago and taken by nobody, such as files of which only a part came."""
    folder = Path(os.environ.get(_FOLDER) or "/")
    if not folder.name.startswith(_PREFIX):
        return  # other programs keep theirs there, too
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > _HOUR:
                path.unlink()
