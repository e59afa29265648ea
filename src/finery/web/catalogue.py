"""The data sets of a folder: listed, and its dataset_info.json changed one entry at a time, so that nobody's entry is lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finery.data.content import locked
from finery.data.files import find_files, kind_of
from finery.data.oddities import repeated_key
from finery.data.registry import FILE, PACKAGED, DatasetEntry, default_folder, find_entry, read_catalogue
from finery.errors import UserError
from finery.files import cache_folder, digest, replace_text
from finery.web.roots import Roots

KEY = "dataset_dir"
_CLOUDS = ("s3", "gs", "gcs")
"""What a page may read from: other schemes reach files of this machine, too."""
_NAME = re.compile(r"[^\s,\x00-\x1f\x7f]([^,\x00-\x1f\x7f]{0,198}[^\s,\x00-\x1f\x7f])?")

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class DataFolder:
    """A folder with a dataset_info.json, or with room for one."""

    path: Path  # where it is read
    home: Path  # where it is written: another place while the packaged sets are shown
    roots: Roots

    @property
    def is_packaged(self) -> bool:
        """Whether the sets that come with Finery are shown, since there is no such folder."""
        return self.path != self.home

    def entries(self) -> dict[str, Any]:
        """As they stand in the file; raises `UserError` where that is broken."""
        found = read_catalogue(str(self.path), None)
        return dict(found.entries) if found else {}

    def files(self, name: str, entry: DatasetEntry) -> list[Path]:
        """The files of an entry that lie on this machine; raises `UserError` for one that lies outside of what the page may touch."""
        if entry.hub or entry.cloud_file_name:
            return []
        self.look_at(name, entry.model_dump(exclude_unset=True))
        found = find_files(name, entry, self.path, {})
        for path in found:
            self._inside(path, name)
        return found

    def look_at(self, name: str, raw: Raw) -> None:
        """Raise `UserError` for an entry that names a place outside of what the page may touch."""
        for key in ("file_name", "folder"):
            if isinstance(text := raw.get(key), str):
                self._inside(self.path / str(raw.get("file_name") or "") / text if key == "folder" else self.path / text, name)
        for key in ("hf_hub_url", "ms_hub_url", "om_hub_url"):
            if isinstance(text := raw.get(key), str) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
                raise UserError(f"data set {name!r}: {key!r} should be a name on a hub such as 'organisation/name', found {text!r}")
            if isinstance(text, str) and (self.roots.home / text).exists():
                self.roots.path(text, key)
        address = raw.get("cloud_file_name")
        if address is not None and (str(address).partition("://")[0] not in _CLOUDS or "::" in str(address)):
            raise UserError(f"data set {name!r}: 'cloud_file_name' should begin with {', '.join(f'{one}://' for one in _CLOUDS)}")

    def _inside(self, path: Path, name: str) -> None:
        if self.is_packaged and "\0" not in str(path) and path.resolve().is_relative_to(PACKAGED.resolve()):
            return
        self.roots.path(str(path), f"file_name of {name}")

    # ------------------------------------------------------------------ changes

    def put(self, name: str, raw: Raw, read: tuple[str, Any] | None = None) -> None:
        """Write an entry; `read` is the one that it takes the place of, as it was when it was read, under its old name or another.

        Raises `UserError` for one that nothing could read, and where the file has changed in between.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"the name of a data set should be a word without commas, found {name!r}")
        find_entry(name, {name: raw})
        self.look_at(name, raw)

        def change(entries: dict[str, Any]) -> dict[str, Any]:
            if read is None or read[0] != name:
                _check_free(name, entries)
            if read is None:
                return {**entries, name: dict(raw)}
            _check_same(read, entries)
            return {(name if key == read[0] else key): (dict(raw) if key == read[0] else entry) for key, entry in entries.items()}

        self._change(change)

    def remove(self, read: tuple[str, Any]) -> None:
        """Take an entry out; its file stays."""

        def change(entries: dict[str, Any]) -> dict[str, Any]:
            _check_same(read, entries)
            return {key: entry for key, entry in entries.items() if key != read[0]}

        self._change(change)

    def _change(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        home = self.made()
        with _held(home):
            path = self.roots.path(str(home / FILE), KEY)
            entries, indent = _read(path)
            written = json.dumps(change(entries), indent=indent, ensure_ascii=False)
            with _told(path):
                replace_text(path, f"{written}\n")

    def made(self) -> Path:
        """The folder to write in. Where the packaged sets are shown they are copied there first: their names go on meaning something."""
        self.roots.path(str(self.home), KEY)
        if self.home.is_relative_to(PACKAGED.resolve()):
            raise UserError(f"{KEY!r} names the sets that come with Finery, which stay as they are; name another folder")
        with _held(self.home), _told(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
            for source in PACKAGED.glob("*.json") if self.is_packaged else ():
                if not (self.home / source.name).exists():
                    shutil.copyfile(source, self.home / source.name)
        return self.home


def data_folder(roots: Roots, asked: str | None) -> DataFolder:
    """The folder that a text names; raises `UserError` where that is outside of what the page may touch."""
    text = (asked or "").strip() or "data"
    if text == "ONLINE" or text.startswith("REMOTE:"):
        raise UserError(f"{KEY!r} {text} has no file here that could be edited; name a folder")
    home = roots.path(text, KEY)
    if home.exists() and not home.is_dir():
        raise UserError(f"{KEY!r} should be a folder, found the file {text}")
    return DataFolder(PACKAGED if default_folder(text) == PACKAGED else home, home, roots)


@dataclass(frozen=True)
class Listed:
    """One line of the list."""

    name: str
    place: str  # a file, or a name on a hub
    formatting: str
    columns: str
    files: tuple[Path, ...]
    trouble: str = ""


def listed(folder: DataFolder) -> Iterator[Listed]:
    """What a folder's dataset_info.json has, entries that cannot be read among them."""
    for name, raw in folder.entries().items():
        try:
            entry = find_entry(name, {name: raw})
            files = folder.files(name, entry)
        except UserError as error:
            yield Listed(name, _place(raw) if isinstance(raw, Mapping) else "", "", "", (), str(error))
            continue
        columns = ", ".join(f"{role}: {column}" for role, column in entry.columns.model_dump(exclude_unset=True).items())
        yield Listed(name, _place(raw), entry.formatting, columns, tuple(files))


def loose_files(folder: DataFolder, sets: list[Listed]) -> list[str]:
    """Files of data that no entry names."""
    known = {file.resolve() for one in sets for file in one.files}
    there = sorted(folder.path.iterdir()) if folder.path.is_dir() else []
    fitting = [path for path in there if path.is_file() and kind_of(path) and path.name != FILE and not path.name.startswith(".")]
    return [path.name for path in fitting if path.resolve() not in known]


def _place(raw: Raw) -> str:
    keys = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")
    return next((str(raw[key]) for key in keys if raw.get(key)), "")


def _read(path: Path) -> tuple[dict[str, Any], int | str | None]:
    """The entries of a file and how it is indented. A file that is broken, or that would lose something, is not written over."""
    if not path.exists():
        return {}, 2
    found = read_catalogue(str(path.parent), None)
    text = path.read_text(encoding="utf-8-sig")
    if (key := repeated_key(text)) is not None:
        raise UserError(f"{path} has the key {key!r} twice in one object; keep one of them, then it can be changed here")
    indent = re.search(r"\{[ \t]*\r?\n([ \t]+)\"", text)
    entries = dict(found.entries) if found else {}
    try:
        json.dumps(entries, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path} has a broken character (a lone surrogate); correct it, then it can be changed here") from None
    return entries, indent[1] if indent else 2


def _check_free(name: str, entries: Raw) -> None:
    if name in entries:
        raise UserError(f"{FILE} has a data set {name!r} already; choose it to change it, or take another name")


def _check_same(read: tuple[str, Any], entries: Raw) -> None:
    name, raw = read
    if name not in entries:
        raise UserError(f"{FILE} has no data set {name!r} any more: somebody has removed or renamed it; nothing was written")
    if entries[name] != raw:
        raise UserError(f"data set {name!r} has been changed by somebody else since it was read; nothing was written: choose it anew")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One at a time: other windows, and other pages on this machine, wait."""
    with locked(cache_folder() / "locks" / f"{digest(str(folder.resolve()))}.lock"):
        yield


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
