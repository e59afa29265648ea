"""dataset_info.json: which name means which file or hub data set, and how its records are to be read."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finery.data.formats import FORMATS
from finery.data.formats.base import Columns, Tags
from finery.data.tables import TABLES
from finery.errors import UserError, nearest, suggestion
from finery.hub import active_hub, fetch
from finery.options import one_of, shown


@dataclass(frozen=True)
class StreamSettings:
    """How a run reads hub data sets as streams."""

    num_rows: int | None  # that the run takes, if it says how many steps it does
    buffer_size: int
    seed: int
    shuffle: bool


PACKAGED = Path(__file__).parents[1] / "demo_data"
"""The small data sets that come with Finery."""
FILE = "dataset_info.json"


class DatasetEntry(BaseModel):
    """One entry of dataset_info.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    om_hub_url: str | None = None
    script_url: str | None = None
    cloud_file_name: str | None = None
    file_name: str | None = None
    formatting: str = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = Field(None, gt=0)
    columns: Columns = Columns()
    tags: Tags = Tags()

    @property
    def hub(self) -> tuple[str, str] | None:
        """Which hub and which name there, or nothing for a local file."""
        named = {"hf": self.hf_hub_url, "ms": self.ms_hub_url, "om": self.om_hub_url}
        order = [active_hub(), "hf", "ms", "om"]
        return next(((hub, name) for hub in order if (name := named[hub])), None)


@dataclass(frozen=True)
class Catalogue:
    """What names of data sets may mean here: raw entries, the folder of their files, and whether any name is a hub's."""

    entries: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    online: bool = False
    trouble: str = ""  # why there are no entries; told where a name needs one
    stream: StreamSettings | None = None  # hub data sets are read while they train

    def entry(self, name: str) -> DatasetEntry | None:
        """The entry of `name`, checked; nothing where `name` is a path, whose format its records tell. Raises `UserError`."""
        if name in self.entries:
            return find_entry(name, self.entries)
        if self.path(name):
            return None
        if self.online:
            return DatasetEntry.model_validate({f"{active_hub()}_hub_url": name})
        if _looks_like_path(name):
            raise UserError(f"data set {name!r}: there is no such file or folder, and {FILE} has none of this name")
        if self.trouble:
            raise UserError(self.trouble)
        return find_entry(name, self.entries)

    def needs(self, name: str) -> bool:
        """Whether `name` means nothing without the file of entries."""
        return not (name in self.entries or self.online or self.path(name) or _looks_like_path(name))

    def is_hub(self, name: str) -> bool:
        """Whether a name means a data set on a hub."""
        try:
            entry = self.entry(name)
        except UserError:
            return False
        return entry is not None and entry.hub is not None

    def path(self, name: str) -> str | None:
        """The file, folder or pattern that `name` is, seen from the working folder or from `dataset_dir`."""
        for base in (Path(), *([self.folder] if self.folder else [])):
            path = str(base / Path(name).expanduser())
            if Path(path).exists() or glob.glob(path, recursive=True):  # noqa: PTH207 -- patterns may be absolute
                return path
        return None


def default_folder(asked: str) -> Path:
    """`dataset_dir`; `data` means the packaged sets where there is no folder of that name, or an empty one (a volume of a container)."""
    folder = Path(asked)
    return PACKAGED if asked == "data" and not (folder.is_dir() and any(folder.iterdir())) else folder


def read_catalogue(dataset_dir: str | Mapping[str, Any], download: Mapping[str, Any] | None) -> Catalogue | None:
    """What `dataset_dir` says: a folder, a dict, ONLINE or REMOTE:name. Raises `UserError` where its file is broken.

    Without `download` nothing is fetched, and what would have to be is nothing.
    """
    if not isinstance(dataset_dir, str):
        return Catalogue(dict(dataset_dir))
    if dataset_dir == "ONLINE":
        return Catalogue(online=True)
    if dataset_dir.startswith("REMOTE:"):
        if download is None:
            return None
        folder = fetch(dataset_dir.removeprefix("REMOTE:").strip(), kind="dataset", hub="hf", **download)  # type: ignore[arg-type]
        return Catalogue(_read_entries(folder / FILE), folder)
    folder = default_folder(dataset_dir)
    path = folder / FILE
    if not path.exists():
        wanted = f"'dataset_dir' should be a folder with a {FILE}; a data set may also be a path to a file or folder"
        return Catalogue(folder=folder, trouble=f"there is no {path}; {wanted}")
    return Catalogue(_read_entries(path), folder)


def _read_entries(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; 'dataset_dir' should be a folder with a {FILE}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: this is not JSON: {error.msg}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path} should hold an object of entries, found a {type(entries).__name__}")
    return entries


def find_entry(name: str, entries: Mapping[str, Any]) -> DatasetEntry:
    """The entry called `name`, checked; raises `UserError`."""
    if name not in entries:
        hint = suggestion(name, entries) or f"; it knows: {', '.join(sorted(entries))}"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            hint = f"{hint}; 'dataset_dir: ONLINE' takes names from a hub"
        raise UserError(f"data set {name!r}: {FILE} has none of this name{hint}")
    if not isinstance(entries[name], Mapping):
        wanted = 'its entry should be an object such as {"file_name": "x.json"}'
        raise UserError(f"data set {name!r}: in {FILE} {wanted}, found {shown(entries[name])}")
    try:
        unknown = unknown_keys(entries[name])
        entry = DatasetEntry(**{key: value for key, value in entries[name].items() if key not in unknown})
    except ValidationError as error:
        faults = [f"data set {name!r}: in {FILE} {'.'.join(map(str, fault['loc']))} {_plain(fault)}" for fault in error.errors()]
        raise UserError(*faults) from None
    if entry.formatting not in FORMATS.names():
        known = one_of(entry.formatting, FORMATS.names())
        raise UserError(f"data set {name!r}: in {FILE} formatting {known}, found {entry.formatting!r}")
    if not re.fullmatch(r"[^\[\]+]+(\[-?\d*%?:-?\d*%?\])?", entry.split):
        wanted = "should be a split's name, or a part of it such as train[:10%] or train[100:200]"
        raise UserError(f"data set {name!r}: in {FILE} split {wanted}, found {entry.split!r}")
    if entry.script_url and not (entry.hub or entry.file_name):
        instead = "convert the data once to .jsonl or .parquet, and give it as 'file_name'"
        raise UserError(f"data set {name!r}: 'script_url' names a program that loads data, which Finery does not run; {instead}")
    if not (entry.hub or entry.cloud_file_name or entry.file_name):
        raise UserError(f"data set {name!r} names no file and no hub; give a 'file_name' beside {FILE}")
    return entry


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """Keys of a raw entry that nobody reads, such as checksums of older files; those that look like a slip are faults instead."""
    known = DatasetEntry.model_fields
    return [key for key in raw if key not in known and nearest(str(key), known) is None]


def _looks_like_path(name: str) -> bool:
    if {ending[1:] for ending in Path(name).suffixes} & set(TABLES.names()):
        return True
    return bool(re.search(r"[/\\*?]|\.\w+$", name)) and not re.fullmatch(r"[\w.-]+/[\w.-]+", name)


def _plain(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        known = [*DatasetEntry.model_fields, *Columns.model_fields, *Tags.model_fields]
        return f"is no such key{suggestion(str(fault['loc'][-1]), known)}"
    return f"{fault['msg'].replace('Input should', 'should')}, found {shown(fault['input'])}"
