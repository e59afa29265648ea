"""What a data set holds: its format, first samples, what a check finds; read in a process of its own, which may take memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finery.errors import UserError

NUM_SAMPLES = 5
MOST_ROWS = 100_000
"""A check on the page looks at so many; `finery check` in a shell looks at all."""
MOST_LETTERS = 4000
"""Of one text; more is cut, and said."""
_SECONDS = 300
_MOST_COLUMNS = 200
_MOST_COUNTS = 10_000
_counts: dict[tuple[tuple[str, int, int], ...], int | None] = {}  # by the state of a set's files; nothing where they cannot be read
_FEW = threading.Semaphore(2)  # processes at a time: each may take as much memory as the largest record


def inspect(folder: Path, name: str, raw: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `main` finds of an entry, or of a file where there is no entry. Raises `UserError` where that takes too long, or fails."""
    return _apart(folder, {"name": name, "raw": dict(raw) if raw is not None else None})


def count(folder: Path, files: Mapping[str, Sequence[Path]]) -> dict[str, int]:
    """How many rows data sets have, by name, as far as their files can be read; those that were counted before are remembered."""
    states = {name: tuple((str(path), *_state(path)) for path in paths) for name, paths in files.items()}
    anew = {name: list(map(str, paths)) for name, paths in files.items() if states[name] not in _counts}
    if anew:
        found = _apart(folder, {"files": anew})
        if len(_counts) > _MOST_COUNTS:
            _counts.clear()
        _counts.update({states[name]: found.get(name) for name in anew})
    return {name: rows for name, state in states.items() if (rows := _counts.get(state)) is not None}


def _state(path: Path) -> tuple[int, int]:
    """Another one where the file has changed."""
    told = path.stat()
    return told.st_size, told.st_mtime_ns


def _apart(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "finery.web.inspecting"]
    with _FEW:
        try:
            ran = subprocess.run(
                command, input=json.dumps(asked), capture_output=True, text=True, cwd=folder, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"it could not be read in {_SECONDS} s; 'finery check' in a shell takes as long as it needs") from None
    try:
        return json.loads(ran.stdout.rpartition("\n")[2])
    except ValueError:
        said = ran.stderr.strip().rpartition("\n")[2][-300:]
        raise UserError(f"it cannot be read: the process that did has ended with code {ran.returncode}; {said}") from None


# ---------------------------------------------------------------------- in the process of its own


def main() -> None:
    """Answer what stands in the input, as the last line of the output."""
    asked = json.loads(sys.stdin.read())
    found = _counted(asked["files"]) if "files" in asked else _report(asked["name"], asked["raw"])
    print(f"\n{json.dumps(found)}", end="", flush=True)


def _counted(files: Mapping[str, Sequence[str]]) -> dict[str, int]:
    from finery.data.files import open_table

    found = {}
    for name, paths in files.items():
        try:
            found[name] = sum(len(open_table(Path(path), False, {})) for path in paths)
        except UserError:
            continue  # its check says why
    return found


def _report(name: str, raw: dict[str, Any] | None) -> dict[str, Any]:
    """An entry's name and itself, or a file's name."""
    from finery.checks.data import Data
    from finery.data.load import DataOptions
    from finery.data.registry import Catalogue, StreamSettings, find_entry
    from finery.data.sources import open_source

    entries = {} if raw is None else {name: {key: value for key, value in raw.items() if key != "num_samples"}}
    found: dict[str, Any] = {"columns": [], "samples": [], "num_rows": 0, "entry": None, "complaint": "", "streamed": False}
    try:
        hub = find_entry(name, entries).hub if raw is not None else None
        streamed = hub is not None and hub[0] == "hf" and not Path(hub[1]).is_dir()
        settings = StreamSettings(NUM_SAMPLES, 1, 0, shuffle=False) if streamed else None
        source = open_source(name, Catalogue(entries, stream=settings), {}, {}, {}, tells=False)
        first, size = source.part()
        found |= _begins(source, range(first, first + min(size, NUM_SAMPLES)))
        found |= {"num_rows": size, "streamed": streamed}
        if raw is None:
            found["entry"] = _proposed(source)
    except UserError as error:
        if raw is None:
            found["columns"] = _columns_of(name)
        return {**found, "complaint": str(error), "findings": [], "checked": []}
    options = DataOptions.model_validate({"dataset": [name], "dataset_dir": entries, "max_samples": MOST_ROWS, "streaming": streamed})
    check = Data()
    findings = [finding.as_dict() | {"said": str(finding)} for finding in check.look(options, {})]
    return {**found, "findings": findings, "checked": [str(one) for one in check.checked]}


def _begins(source: Any, rows: range) -> dict[str, Any]:
    """The columns and the first samples, or why a row is none."""
    from finery.data.sample import BadRecord

    columns: dict[str, None] = {}
    samples: list[dict[str, Any]] = []
    for row in rows:
        try:
            record = source.record(row)
            columns |= dict.fromkeys(map(str, record) if isinstance(record, Mapping) else ())
            samples.append({"place": source.place(row), "parts": list(_parts(source.read(record)))})
        except BadRecord as error:
            samples.append({"place": source.place(row), "parts": [("broken", str(error)[:MOST_LETTERS])]})
    return {"columns": list(columns)[:_MOST_COLUMNS], "samples": samples}


def _parts(sample: Any) -> list[tuple[str, str]]:
    """A sample's texts with their roles, in the order in which a model reads them."""
    told: list[tuple[str, str]] = [("system", sample.system), ("tools", sample.tools)]
    for message in sample.messages:
        told += [("thought", message.thought), ("said", message.before_calls), (message.role, message.content)]
    for role, message in (("chosen", sample.chosen), ("rejected", sample.rejected)):
        if message is not None:
            told += [("thought", message.thought), (role, message.content)]
    if sample.desirable is not None:
        told.append(("kto_tag", str(sample.desirable).lower()))
    media = {"images": sample.images, "videos": sample.videos, "audios": sample.audios}
    told += [(role, str(thing)) for role, things in media.items() for thing in things]
    told.append(("broken", sample.unanswered))
    return [(role, _cut(text)) for role, text in told if text]


def _cut(text: str) -> str:
    rest = len(text) - MOST_LETTERS
    return f"{text[:MOST_LETTERS]} […+{rest:,}]" if rest > 0 else text


def _columns_of(file: str) -> list[str]:
    """Of a file whose format cannot be told, as far as it can be read."""
    from finery.data.files import local_files, open_table
    from finery.data.sample import BadRecord

    try:
        record = open_table(local_files(file)[0], False, {})[0]
    except (UserError, BadRecord, IndexError):
        return []
    return [str(column) for column in record][:_MOST_COLUMNS] if isinstance(record, Mapping) else []


def _proposed(source: Any) -> dict[str, Any]:
    """What `dataset_info.json` has to say of a file: what is the format's default, or was not there to be read, is left out."""
    from finery.data.formats import FORMATS
    from finery.data.registry import DatasetEntry
    from finery.data.sources import NUM_LOOKED_AT

    found = source.entry.model_dump(exclude_unset=True)
    defaults = FORMATS[found["formatting"]].default_columns
    there = _begins(source, range(min(len(source), NUM_LOOKED_AT)))["columns"]
    columns = {
        role: column
        for role, column in found.pop("columns").items()
        if column != (default := getattr(defaults, role)) and not (column is None and default not in there)
    }
    usual = {name: field.default for name, field in DatasetEntry.model_fields.items()}
    entry = {key: value for key, value in found.items() if value != usual[key] and value != {}}
    return entry | ({"columns": columns} if columns else {})


if __name__ == "__main__":
    main()
