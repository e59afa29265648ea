"""Which files a data set has: a path, a folder, a pattern, a hub's split, a cloud's file; unpacked where they are compressed."""

from __future__ import annotations

import glob
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finery.data.content import CHUNK_BYTES, Rate, check_unchanged, full_disk, identify, made_once
from finery.data.registry import FILE, DatasetEntry
from finery.data.tables import TABLES
from finery.data.tables.base import Table, layout
from finery.errors import UserError
from finery.files import digest
from finery.hub import fetch

PACKED = (".gz", ".zst")
METADATA = (FILE, "dataset_infos.json")
"""Files beside the records that hold none."""


def endings() -> tuple[str, ...]:
    """What the name of a file with records may end in, apart from .gz and .zst."""
    return tuple(f".{name}" for name in TABLES.names())


def kind_of(path: Path) -> str:
    """The ending that says how a file is read, without that of its compression; empty where nothing reads it."""
    ending = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return ending if ending in endings() else ""


def find_files(name: str, entry: DatasetEntry, folder: Path | None, download: Mapping[str, Any]) -> list[Path]:
    """The files of an entry, in the order of their names; hub and cloud files are fetched. Raises `UserError`."""
    if entry.hub:
        hub, repository = entry.hub
        found = fetch(repository, kind="dataset", hub=hub, **download)  # type: ignore[arg-type]
        return hub_files(name, found / entry.folder if entry.folder else found, entry)
    if entry.cloud_file_name:
        return list(_from_cloud(name, entry.cloud_file_name))
    path = (folder or Path()) / str(entry.file_name)
    return local_files(str(path / entry.folder if entry.folder and path.is_dir() else path))


def local_files(pattern: str) -> list[Path]:
    """A file, all files directly in a folder, or those that a pattern names; hidden ones are none."""
    path = Path(pattern)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.is_file() and kind_of(file) and _is_data(file)]
    else:
        found = [Path(file) for file in sorted(glob.glob(pattern, recursive=True)) if Path(file).is_file()]  # noqa: PTH207
        found = [file for file in found if _is_data(file)]
    readable = f"{', '.join(endings())}, also with .gz or .zst"
    if not found:
        there = "holds no file that ends in" if path.is_dir() else "does not exist; a data set's file should end in"
        raise UserError(f"{pattern} {there} {readable}")
    if strange := next((file for file in found if not kind_of(file)), None):
        raise UserError(f"{strange} should end in one of {readable}")
    return found


def _is_data(path: Path) -> bool:
    return path.name not in METADATA and not path.name.startswith(".")


def hub_files(name: str, folder: Path, entry: DatasetEntry) -> list[Path]:
    """The files of a split in a snapshot of a hub, as the data set's card and the names of its files tell."""
    split = entry.split.partition("[")[0]
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and kind_of(file) and _is_data(file)]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not found:
        raise UserError(f"data set {name!r}: {folder} holds no file that ends in {', '.join(endings())}")
    if named := _from_card(name, folder, entry.subset, split):
        return named
    if entry.subset:
        found = [file for file in found if entry.subset in file.relative_to(folder).parts[:-1]] or [
            file for file in found if _names(entry.subset, file.relative_to(folder))
        ]
        if not found:
            raise UserError(f"data set {name!r}: no folder and no file in {folder} is named for the subset {entry.subset!r}")
    elif top := [file for file in found if file.parent == folder]:
        found = top
    of_split = [file for file in found if _names(split, file.relative_to(folder))]
    if not of_split and split != "train":
        raise UserError(f"data set {name!r}: no file in {folder} is named for the split {split!r}")
    return of_split or found  # where no name says so, every file belongs to the training split


def _names(word: str, path: Path) -> bool:
    return re.search(rf"(^|[^a-z0-9]){re.escape(word)}([^a-z0-9]|$)", str(path), re.IGNORECASE) is not None


def _from_card(name: str, folder: Path, subset: str | None, split: str) -> list[Path]:
    """The files that the front matter of a data set's README.md lists for a subset and a split, if it does."""
    import yaml

    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        facts = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return []
    configs = facts.get("configs") if isinstance(facts, dict) else None
    configs = configs if isinstance(configs, list) else []
    listed = [config for config in configs if isinstance(config, dict) and _patterns(config.get("data_files"))]
    wanted = [config for config in listed if config.get("config_name") == (subset or "default")]
    wanted = wanted or ([config for config in listed if config.get("default")] or listed[:1] if not subset else [])
    if not wanted:
        if subset and listed:
            known = ", ".join(str(config.get("config_name")) for config in listed)
            raise UserError(f"data set {name!r}: there is no subset {subset!r}; its card lists {known}")
        return []
    patterns = _patterns(wanted[0]["data_files"])
    if split not in patterns:
        raise UserError(f"data set {name!r}: there is no split {split!r}; its card lists {', '.join(patterns)}")
    base = folder / str(wanted[0].get("data_dir") or "")
    found = {base / file for pattern in patterns[split] for file in glob.glob(pattern, root_dir=base, recursive=True)}  # noqa: PTH207
    return sorted(file for file in found if file.is_file() and kind_of(file))


def _patterns(files: Any) -> dict[str, list[str]]:
    """The patterns of each split in a card's `data_files`: one pattern, a list of them, or objects with `split` and `path`."""
    if isinstance(files, dict):
        files = [files] if "path" in files else [{"split": split, "path": path} for split, path in files.items()]
    several = files if isinstance(files, list) else [files]
    found: dict[str, list[str]] = {}
    for part in several:
        split, path = (part.get("split") or "train", part.get("path")) if isinstance(part, dict) else ("train", part)
        usable = [one for one in (path if isinstance(path, list) else [path]) if isinstance(one, str) and one and not one.startswith("/")]
        if usable:
            found.setdefault(str(split), []).extend(usable)
    return found


def _from_cloud(name: str, address: str) -> Iterator[Path]:
    """The file at a cloud's address, or all directly in a folder there, kept in the cache until it changes there."""
    fs, inner = _open_cloud(name, address)
    try:
        info = fs.info(inner)
        listed = [info] if info["type"] == "file" else fs.ls(inner, detail=True)
        files = sorted((file for file in listed if file["type"] == "file" and kind_of(Path(file["name"]))), key=lambda file: file["name"])
        if not files:
            raise UserError(f"data set {name!r}: {address} holds no file that ends in {', '.join(endings())}")
        for file in files:
            target = Path(file["name"]).name
            state = digest(address, file["name"], str(fs.ukey(file["name"])))

            def take(beside: Path, file: Any = file, target: str = target) -> None:
                with fs.open(file["name"], "rb") as source:
                    _copy(source, beside / target, f"fetching {target}", file.get("size"))

            yield made_once(f"{state}.cloud", take) / target
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data set {name!r}: {address} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _open_cloud(name: str, address: str) -> tuple[Any, str]:
    """The file system and the path of an address: without an account first, then with the one of the environment."""
    import fsspec

    scheme = address.partition("://")[0]
    first = {"s3": {"anon": True}, "gs": {"token": "anon"}, "gcs": {"token": "anon"}}.get(scheme, {})
    try:
        fs, inner = fsspec.core.url_to_fs(address, **first)
    except ImportError as error:
        raise UserError(f"data set {name!r}: {address} needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise UserError(f"data set {name!r}: 'cloud_file_name' {address!r} cannot be used: {error}") from None
    if first:
        try:
            fs.info(inner)
        except (OSError, RuntimeError):
            fs, inner = fsspec.core.url_to_fs(address)
    return fs, inner


def open_table(path: Path, anew: bool, taken: dict[Path, str]) -> Table:
    """A file's table: its index, or what it is converted to, is made when its content is first seen.

    A digest that was remembered rather than computed now is noted in `taken`.
    """
    content, remembered = identify(path, anew)
    if remembered:
        taken[path] = content
    kind = kind_of(path)[1:]
    if path.suffix in PACKED:

        def unpack(beside: Path) -> None:
            _unpack(path, beside / f"records.{kind}")
            check_unchanged(path, content)

        inner = made_once(f"{content}.unpacked", unpack) / f"records.{kind}"
        return _open(inner, kind, content, path)
    return _open(path, kind, content, path)


def _open(path: Path, kind: str, content: str, told_as: Path) -> Table:
    def build(beside: Path) -> None:
        table.build(path, beside)
        check_unchanged(told_as, content)

    try:
        kind = _sniffed(path, kind)
        table = TABLES[kind]
        made = made_once(f"{content}.{kind}.{layout()}", build)
    except UserError as error:
        raise UserError(*(line.replace(str(path), str(told_as)) for line in error.complaints)) from None
    opened = table(path, made)
    opened.told_as = told_as
    check_unchanged(told_as, content)
    return opened


def _sniffed(path: Path, kind: str) -> str:
    """`.json` and `.jsonl` may each hold a list or lines: the first character tells."""
    if kind not in ("json", "jsonl"):
        return kind
    with path.open("rb") as file:
        head = file.read(1 << 16)
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begin == b"[":
        return "json"
    if begin == b"{" and kind == "json":
        _check_lines(path, head)
    return "jsonl"


def _check_lines(path: Path, head: bytes) -> None:
    """A `.json` that begins with an object holds a record a line, or is something else than records."""
    import json

    first, end, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    try:
        json.loads(first.decode("latin-1"))  # another encoding than UTF-8 is told where the line is read
    except RecursionError:
        return
    except ValueError:
        if end:
            raise UserError(f"{path} holds one JSON object; it should hold a list of records, or one record a line") from None


def _unpack(path: Path, target: Path) -> None:
    """Write what a compressed file holds."""
    import pyarrow as pa

    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as source:
                _copy(source, target, f"unpacking {path.name}", None)
        else:
            with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, "zstd") as source:
                _copy(source, target, f"unpacking {path.name}", None)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        if isinstance(error, OSError) and (full := full_disk(error)):
            raise full from None
        raise UserError(f"{path} cannot be unpacked, it may be cut off: {error}") from None


def _copy(source: Any, target: Path, doing: str, size: int | None) -> None:
    rate = Rate(doing, "bytes", size)
    with target.open("wb") as out:
        while chunk := source.read(CHUNK_BYTES):
            out.write(chunk)
            rate.add(len(chunk))
    rate.end()
