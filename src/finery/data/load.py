"""Names become samples, samples become encoded sets: reading, placeholders, splits, encoding."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finery.data.formats import FORMATS
from finery.data.records import read_records
from finery.data.registry import DatasetEntry, find_entry, read_registry, unknown_keys
from finery.data.sample import BadRecord, Message, Sample
from finery.errors import UserError
from finery.hub import fetch
from finery.log import get_logger
from finery.options import CommaList, Finding, OptionGroup

if TYPE_CHECKING:
    from finery.data.encoding import EncodedSet
    from finery.data.rows.base import Rows

log = get_logger(__name__)

Numbered = tuple[int, Any]
"""A record and its row in the file, counted from 0."""


class DataOptions(OptionGroup):
    dataset: CommaList = ()
    """Data sets to train on: names in dataset_info.json, separated by commas."""
    eval_dataset: CommaList = ()
    """Data sets to evaluate on."""
    dataset_dir: str | dict[str, Any] = "data"
    """The folder that holds dataset_info.json; where there is no folder `data`, the packaged demo sets."""
    cutoff_len: int = Field(2048, gt=0)
    """The most tokens of a row; longer ones are cut, shared between question and answer."""
    max_samples: int | None = Field(None, gt=0)
    """Keep only the first so many records of each data set."""
    val_size: float = Field(0.0, ge=0)
    """What is split off for evaluation: a number of samples, or a fraction below 1."""
    overwrite_cache: bool = False
    """Encode anew, even where the same rows were encoded before."""
    preprocessing_num_workers: int | None = Field(None, gt=0)
    """Processes that encode."""
    placeholders: dict[str, str] = Field(default_factory=dict)
    """Words to fill in: `{name: Ada}` replaces `{{name}}` in every text of the data."""

    def check(self, run: Any) -> Iterator[Finding]:
        """Contradictions between the data keys, and names that no registry knows."""
        if self.val_size and not self.dataset:
            yield Finding("val_size", "splits 'dataset', which is not given")
        if self.val_size and self.eval_dataset:
            yield Finding("val_size", "and 'eval_dataset' exclude each other: keep one")
        if self.val_size > 1 and self.val_size != int(self.val_size):
            yield Finding("val_size", f"should be a whole number or a fraction below 1, found {self.val_size}")
        for key in ("dataset", "eval_dataset"):
            names = tuple(dict.fromkeys(getattr(self, key)))
            if len(names) < len(getattr(self, key)):
                yield Finding(key, "names a data set twice; it is used once", fatal=False)
            try:
                entries, folder = read_registry(self.dataset_dir) if names else ({}, None)
            except UserError as error:
                yield Finding("dataset_dir", f"cannot be used: {error}")
                return
            for name in names:
                yield from _check_name(key, name, entries, folder, run.method)


@dataclass(frozen=True)
class Sets:
    """The encoded sets of a run; no evaluation set where none was asked for."""

    train: EncodedSet | None
    eval: EncodedSet | None


def _check_name(key: str, name: str, entries: Mapping[str, Any], folder: Path | None, method: Any) -> Iterator[Finding]:
    try:
        entry = find_entry(name, entries)
    except UserError as error:
        prefix = f"data set {name!r}: "
        yield from (Finding(key, f"names {name!r}: {text.removeprefix(prefix)}") for text in error.complaints)
        return
    if entry.ranking != method.ranking:
        kind = "pairs of a better and a worse answer" if method.ranking else "plain answers"
        yield Finding(key, f"names {name!r} with 'ranking: {str(entry.ranking).lower()}', but this stage learns from {kind}")
    for column in ("kto_tag", "images", "videos", "audios"):
        if getattr(entry.columns, column) and column not in method.reads:
            yield Finding(
                key, f"names {name!r}, which has a column for {column!r} that this stage does not read; take it out of the columns"
            )
    if not entry.hub and not (path := (folder or Path()) / str(entry.file_name)).exists():
        yield Finding(key, f"names {name!r}, whose file {path} does not exist")


def load_sets(options: DataOptions, rows: Rows, seed: int, download: Mapping[str, Any], key: str) -> Sets:
    """Read, split and encode what a run trains and evaluates on.

    `download` holds `cache_dir` and `tokens` for the hubs; `key` is a digest of what else shapes the tokens
    (tokenizer and template). Raises `UserError` where nothing is left to train on.
    """
    read = _reader(options, download, seed)
    train = [sample for name in dict.fromkeys(options.dataset) for sample in read(name)]
    held_out = [sample for name in dict.fromkeys(options.eval_dataset) for sample in read(name)]
    if options.val_size:
        train, held_out = split(train, options.val_size, seed)
    encode = _encoder(options, rows, key)
    sets = Sets(encode("train", train), encode("eval", held_out))
    asked_eval = options.eval_dataset or options.val_size
    for asked, found, purpose in ((options.dataset, sets.train, "train"), (asked_eval, sets.eval, "evaluate")):
        if asked and (found is None or found.num_rows == 0):
            raise UserError(f"no row is left to {purpose} on; the reasons are told above")
    return sets


def split(samples: list[Sample], size: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out `size` samples (a number, or a fraction below 1), drawn by `seed`; both keep their order."""
    count = math.ceil(size * len(samples)) if size < 1 else int(size)
    if count >= len(samples):
        raise UserError(f"'val_size' takes {count} of {len(samples)} samples and leaves none to train on")
    held = set(random.Random(seed).sample(range(len(samples)), count))
    return (
        [sample for place, sample in enumerate(samples) if place not in held],
        [sample for place, sample in enumerate(samples) if place in held],
    )


def _encoder(options: DataOptions, rows: Rows, key: str) -> Callable[[str, list[Sample]], EncodedSet | None]:
    from finery.data.encoding import encode_samples

    def encode(part: str, samples: list[Sample]) -> EncodedSet | None:
        if not samples:
            return None
        workers = options.preprocessing_num_workers or 1
        return encode_samples(samples, rows, f"{key}:{options.cutoff_len}", workers, options.overwrite_cache, part)

    return encode


def _reader(options: DataOptions, download: Mapping[str, Any], seed: int) -> Callable[[str], list[Sample]]:
    entries, folder = read_registry(options.dataset_dir)

    def read(name: str) -> list[Sample]:
        entry = find_entry(name, entries)
        for unknown in unknown_keys(entries[name]):
            log.warning("%s: %r in dataset_info.json is read by nothing", name, unknown)
        path = _locate(entry, folder, download)
        records = list(enumerate(read_records(path, entry, None if entry.num_samples else options.max_samples)))
        samples, reasons = _samples(name, _draw(records, entry, seed)[: options.max_samples], entry)
        _tell_left_out(name, reasons, len(samples))
        return _fill(samples, options.placeholders, name)

    return read


def _locate(entry: DatasetEntry, folder: Path | None, download: Mapping[str, Any]) -> Path:
    if entry.hub:
        hub, name = entry.hub
        return fetch(name, kind="dataset", hub=hub, **download)  # type: ignore[arg-type]
    return (folder or Path()) / str(entry.file_name)


def _draw(records: list[Numbered], entry: DatasetEntry, seed: int) -> list[Numbered]:
    """The registry's `num_samples`: so many records in random order, again from the start where there are fewer."""
    if entry.num_samples is None or not records:
        return records
    drawn: list[Numbered] = []
    dice = random.Random(seed)
    while len(drawn) < entry.num_samples:
        drawn += dice.sample(records, min(len(records), entry.num_samples - len(drawn)))
    return drawn


def _samples(name: str, records: list[Numbered], entry: DatasetEntry) -> tuple[list[Sample], dict[str, list[int]]]:
    form = FORMATS[entry.formatting](entry.columns, entry.tags)
    samples: list[Sample] = []
    reasons: dict[str, list[int]] = {}
    for row, record in records:
        try:
            if not isinstance(record, Mapping):
                raise BadRecord(f"a record should be an object, found {type(record).__name__}")
            messages, system, tools = form.read(record)
            samples.append(Sample(tuple(messages), system, tools, name, row))
        except BadRecord as error:
            reasons.setdefault(str(error), []).append(row)
    return samples, reasons


def _tell_left_out(name: str, reasons: Mapping[str, list[int]], num_used: int) -> None:
    for reason, rows in reasons.items():
        first = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        log.warning(
            "%s: %d of %d records left out (rows %s, counted from 0): %s",
            name,
            len(rows),
            num_used + sum(map(len, reasons.values())),
            first,
            reason,
        )


def _fill(samples: list[Sample], words: Mapping[str, str], name: str) -> list[Sample]:
    """Replace `{{word}}` in every text; say which of the well-known ones stay unfilled."""

    def fill(text: str) -> str:
        for word, value in words.items():
            text = text.replace("{{" + word + "}}", value)
        return text

    if words:
        samples = [
            replace(
                sample,
                system=fill(sample.system),
                messages=tuple(Message(message.role, fill(message.content)) for message in sample.messages),
            )
            for sample in samples
        ]
    for word in ("name", "author"):
        left = sum(
            "{{" + word + "}}" in "\n".join([sample.system, *(message.content for message in sample.messages)]) for sample in samples
        )
        if left:
            log.warning("%s: %d samples still say {{%s}}; set 'placeholders.%s' to fill it in", name, left, word, word)
    return samples
