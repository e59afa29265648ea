"""What a check is, and what it finds."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from finery.data.load import DataOptions, stage_faults
from finery.data.oddities import ANSWERS
from finery.data.registry import Catalogue, StreamSettings
from finery.data.rows.chat import UNREAD_MEDIA
from finery.data.sample import Sample
from finery.data.sources import Source, open_source
from finery.errors import UserError
from finery.files import read_yaml

Effect = Literal["stops the run", "left out", "kept"]
"""What training does about it: it does not begin, it passes the rows over, or it takes them as they stand."""


@dataclass(frozen=True)
class Finding:
    """Something to be mended: where, what was found, what would do."""

    place: str  # a key, a file, or `file:row:path`, rows counted from 0
    what: str
    mend: str = ""
    effect: Effect = "kept"
    rows: tuple[str, ...] = ()  # the first of the rows that it is true of, as `file:row`
    num_rows: int = 0
    line: int | None = None  # of the first row, where its file has lines

    @property
    def fatal(self) -> bool:
        """Whether training would refuse to begin."""
        return self.effect == "stops the run"

    def __str__(self) -> str:
        about = [f"line {self.line}"] if self.line else []
        if self.num_rows > 1:
            file = self.rows[0].rpartition(":")[0]
            names = [name.removeprefix(f"{file}:") for name in self.rows]
            about.append(f"{self.num_rows:,} rows: {', '.join(names)}{', …' if self.num_rows > len(names) else ''}")
        if self.effect != "kept":
            about.append(self.effect)
        told = "; ".join(filter(None, (self.what, self.mend)))
        return f"{self.place}: {told}" + (f" ({'; '.join(about)})" if about else "")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Checked:
    """What was looked at whole, whether anything was found or not."""

    name: str
    num_rows: int
    num_used: int  # rows that can be learnt
    seconds: float
    note: str = ""
    told: str = ""  # what else there is to say of them
    again: bool = False  # another check counts these rows

    def __str__(self) -> str:
        left_out = self.num_rows - self.num_used
        told = (f", {left_out:,} of them left out" if left_out else "") + (f": {self.told}" if self.told else "")
        rows = f"{self.num_rows:,}{self.note} {'row' if self.num_rows == 1 else 'rows'}"
        return f"{self.name}: {rows} in {self.seconds:.1f} s{told}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


NUM_FIRST = 3
"""So many rows are named of those with the same finding."""
MOST_KINDS = 100
"""From then on findings of a data set are told apart less finely: what is remembered of it stays bounded."""
NUM_STREAMED = 1000
"""So many rows are looked at of a data set that is streamed from a hub: nobody knows how many it has."""
_PATH = re.compile(r"'([^']+)'((?:\[\d+\]|\.\w+)*) (?!and )(.+)", re.DOTALL)
"""How readers of records begin: 'messages'[3].from should be ..."""
_PLACE = re.compile(r"(\S+:\d+): (.+)", re.DOTALL)
"""How readers of files do: x.json:7: this is not JSON."""


class Check(ABC):
    """Looks for what is wrong with a run before it begins; it trains nothing and changes nothing."""

    def __init__(self) -> None:
        self.checked: list[Checked] = []
        """What was looked at so far."""

    @abstractmethod
    def findings(self, run: Any) -> Iterator[Finding]:
        """What there is to mend about a `finery.run.Run`, each as soon as it is known."""


@dataclass(frozen=True)
class Opened:
    """The rows of a data set that a run reads."""

    source: Source
    first: int
    size: int
    folder: Path | None  # that its registry is in


def open_rows(
    key: str, name: str, options: DataOptions, download: Mapping[str, Any], catalogue: Catalogue, method: Any
) -> Generator[Finding, None, Opened | None]:
    """A data set to be read, or why it cannot be."""
    if options.streaming and key == "dataset":
        catalogue = replace(catalogue, stream=StreamSettings(NUM_STREAMED, options.buffer_size, 0, shuffle=False))
    try:
        source = open_source(name, catalogue, download, options.placeholders, {}, options.overwrite_cache, tells=False)
        if faults := [f"names {name!r}{fault}" for fault in stage_faults(source.entry, method)] if method else ():
            raise UserError(*faults)
        first, size = source.part()
        if not size:
            raise UserError(f"its split {source.entry.split!r} holds no records")
    except UserError as error:
        yield from refusals(key, name, error)
        return None
    most = options.max_samples if source.entry.num_samples is None else None
    folder = catalogue.folder if name in catalogue.entries and not source.entry.hub else None
    return Opened(source, first, min(size, most or size), folder)


def refusals(key: str, name: str, error: UserError) -> Iterator[Finding]:
    """Why training would not begin with a data set."""
    for complaint in error.complaints:
        said = complaint.removeprefix(f"data set {name!r}").removeprefix(":").strip()
        placed = _PLACE.fullmatch(said)
        place = key if said.startswith("names ") else shown_path(Path(placed[1])) if placed else f"data set {name!r}"
        yield Finding(place, *mended(placed[2] if placed else said), "stops the run")


class _Group:
    """Findings that are equal but for their rows; the first stands for all."""

    def __init__(self, effect: Effect, path: str, what: str, mend: str) -> None:
        self.effect: Effect = effect
        self.path = path
        self.what = what
        self.mend = mend
        self.rows: list[int] = []
        self.count = 0


class Groups:
    """The findings about the rows of one data set."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._groups: dict[tuple[Effect, str], _Group] = {}

    def add(self, row: int, effect: Effect, said: str, mend: str = "", kind: str = "") -> None:
        """What a reader says of a row."""
        key: tuple[Effect, str] = (effect, re.sub(r"\d+", "#", kind or said))
        if key not in self._groups and len(self._groups) >= MOST_KINDS:
            key = (effect, key[1].partition(" found ")[0])
            if key not in self._groups and len(self._groups) >= 2 * MOST_KINDS:
                key = (effect, "")
        group = self._groups.get(key)
        if group is None:
            found = _PATH.fullmatch(said)
            path = found[1] + found[2] if found else ""
            what, mend = (said, mend) if mend else mended(said, "correct the row, or take it out")
            what = what[found.start(3) :] if found else what
            group = self._groups[key] = _Group(effect, path, what, mend)
        group.count += 1
        if len(group.rows) < NUM_FIRST:
            group.rows.append(row)

    def findings(self) -> Iterator[Finding]:
        """One for each group, in the order in which they were met."""
        for group in self._groups.values():
            rows = [f"{shown_path(file)}:{inner}" for file, inner in map(self.source.file_row, group.rows)]
            table, inner = self.source.find(group.rows[0])
            place = f"{rows[0]}:{group.path}" if group.path else rows[0]
            yield Finding(place, group.what, group.mend, group.effect, tuple(rows), group.count, table.line(inner))


def unlearnable(sample: Sample, answers: bool, media: Collection[str] | None) -> str:
    """Why nothing can be learnt from a sample, whatever the template; empty where something can."""
    if not answers:
        return "" if sample.chosen or sample.messages[0].content else "the text is empty"
    if sample.unanswered:
        return sample.unanswered
    if media is not None and sample.has_media:
        return UNREAD_MEDIA
    spoken = [message.train for message in sample.messages if message.role in ANSWERS]
    return "none of its answers is to be learnt" if spoken and all(train is False for train in spoken) else ""


def shown_path(path: Path) -> str:
    """A file as it is told: from the working folder where it lies in it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@cache
def _mends() -> Collection[tuple[re.Pattern[str], str]]:
    table = read_yaml(Path(__file__).with_name("mends.yaml"))
    return [(re.compile(line["when"]), line["mend"]) for line in table]


def mended(said: str, otherwise: str = "") -> tuple[str, str]:
    """What a reader says, and what would mend it."""
    said = re.sub(r"(?<!\.)\.$", "", said)
    for pattern, mend in _mends():
        if pattern.search(said):
            return said, mend
    what, _, mend = said.partition("; ")
    return what, mend or otherwise
