"""dataset_info.json: which name means which file or hub data set, and how its records are to be read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finery.data.formats import FORMATS
from finery.data.formats.base import Columns, Tags
from finery.errors import UserError, nearest, suggestion
from finery.hub import active_hub
from finery.options import one_of, shown

PACKAGED = Path(__file__).parents[1] / "demo_data"
"""The small data sets that come with Finery."""


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


def default_folder(asked: str) -> Path:
    """`dataset_dir`; `data` means the packaged sets where there is no folder of that name."""
    return PACKAGED if asked == "data" and not Path(asked).is_dir() else Path(asked)


def read_registry(dataset_dir: str | Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """The raw entries by name and the folder that file names refer to; raises `UserError`."""
    if not isinstance(dataset_dir, str):
        return dict(dataset_dir), None
    if dataset_dir == "ONLINE" or dataset_dir.startswith("REMOTE:"):
        raise UserError(f"'dataset_dir: {dataset_dir}' is not built yet; name hub data sets in a dataset_info.json ('hf_hub_url')")
    folder = default_folder(dataset_dir)
    path = folder / "dataset_info.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}; 'dataset_dir' should be a folder with a dataset_info.json") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; 'dataset_dir' should be a folder with a dataset_info.json") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: this is not JSON: {error.msg}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path} should hold an object of entries, found a {type(entries).__name__}")
    return entries, folder


def find_entry(name: str, entries: Mapping[str, Any]) -> DatasetEntry:
    """The entry called `name`, checked; raises `UserError`."""
    if name not in entries:
        hint = suggestion(name, entries) or f"; it knows: {', '.join(sorted(entries))}"
        raise UserError(f"data set {name!r}: dataset_info.json has none of this name{hint}")
    if not isinstance(entries[name], Mapping):
        wanted = 'its entry should be an object such as {"file_name": "x.json"}'
        raise UserError(f"data set {name!r}: in dataset_info.json {wanted}, found {shown(entries[name])}")
    try:
        unknown = unknown_keys(entries[name])
        entry = DatasetEntry(**{key: value for key, value in entries[name].items() if key not in unknown})
    except ValidationError as error:
        faults = [f"data set {name!r}: in dataset_info.json {'.'.join(map(str, fault['loc']))} {_plain(fault)}" for fault in error.errors()]
        raise UserError(*faults) from None
    if entry.formatting not in FORMATS.names():
        raise UserError(
            f"data set {name!r}: in dataset_info.json formatting {one_of(entry.formatting, FORMATS.names())}, found {entry.formatting!r}"
        )
    if "[" in entry.split:
        raise UserError(f"data set {name!r}: a part of a split ({entry.split!r}) is not supported yet; set 'max_samples' or 'num_samples'")
    for key in ("script_url", "cloud_file_name", "subset"):
        if getattr(entry, key):
            raise UserError(f"data set {name!r}: {key!r} is not supported yet; give a 'file_name' beside dataset_info.json")
    if not (entry.hub or entry.file_name):
        raise UserError(f"data set {name!r} names no file and no hub; give a 'file_name' beside dataset_info.json")
    return entry


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """Keys of a raw entry that nobody reads, such as checksums of older files; those that look like a slip are faults instead."""
    known = DatasetEntry.model_fields
    return [key for key in raw if key not in known and nearest(str(key), known) is None]


def _plain(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        known = [*DatasetEntry.model_fields, *Columns.model_fields, *Tags.model_fields]
        return f"is no such key{suggestion(str(fault['loc'][-1]), known)}"
    return f"{fault['msg'].replace('Input should', 'should')}, found {shown(fault['input'])}"
