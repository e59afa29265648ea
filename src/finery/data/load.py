"""Names become sets: sources are opened, drawn from, mixed and split; what is asked of them all at once is encoded ahead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from finery.data.claim import release
from finery.data.mixing import STRATEGIES, Mixture, Part, Selection, hold_out
from finery.data.order import ByLength, Order, Sequential, Shuffled, mix
from finery.data.packing import PackingOptions, make_packs
from finery.data.registry import Catalogue, DatasetEntry, StreamSettings, read_catalogue
from finery.data.sources import Source, open_source
from finery.errors import UserError
from finery.log import get_logger
from finery.options import CommaList, Finding, OptionGroup, PathText

if TYPE_CHECKING:
    from finery.data.encoder import Encoder
    from finery.data.rows.base import RowOptions, Rows
    from finery.data.sets import SampleSet, UnitSet
    from finery.data.template import Template

log = get_logger(__name__)

Sampling = Literal["random", "sequential", "group_by_length"]

NUM_TRIED = 1000
"""A set is refused when this many of its samples yield nothing to learn."""


class DataOptions(OptionGroup):
    dataset: CommaList = ()
    """Data sets to train on: names in dataset_info.json, or paths of files, folders and patterns, separated by commas."""
    eval_dataset: CommaList = ()
    """Data sets to evaluate on."""
    dataset_dir: str | dict[str, Any] = "data"
    """The folder that holds dataset_info.json, ONLINE for names on a hub, or REMOTE:name for a dataset_info.json on a hub; where there is
    no folder `data`, the packaged demo sets."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = "concat"
    """How several data sets become one: one after the other, or in turn until the first is used up, until all are (repeating shorter ones),
    or until all are without repeating."""
    interleave_probs: tuple[float, ...] = ()
    """With what weight each data set is drawn from when they are interleaved; they need not sum to 1."""
    max_samples: int | None = Field(None, gt=0)
    """Keep only the first so many records of each data set."""
    val_size: float = Field(0.0, ge=0)
    """What is split off for evaluation: a number of samples, or a fraction below 1."""
    eval_on_each_dataset: bool = False
    """Evaluate each evaluation set by itself: eval_<name>_loss."""
    streaming: bool = False
    """Files of any size are read piece by piece anyway; data sets on a hub are then read from there as they are needed."""
    buffer_size: int = Field(16384, gt=0)
    """How many samples of a streamed hub data set are shuffled at a time."""
    overwrite_cache: bool = False
    """Encode anew, even where the same rows were encoded before."""
    tokenized_path: PathText | None = None
    """A folder for the encoded data: written whole before training, or taken as it is where it fits these settings."""
    preprocessing_num_workers: int | None = Field(None, gt=0)
    """Processes that encode; by default one beside the training, and as many as there are cores where everything is encoded first."""
    placeholders: dict[str, str] = Field(default_factory=dict)
    """Words to fill in: `{name: Ada}` replaces `{{name}}` in every text of the data."""

    @field_validator("interleave_probs", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        """`0.7, 0.3`, one number, or a list."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return (value,)
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    def check(self, run: Any) -> Iterator[Finding]:
        """Contradictions between the data keys, and names that no registry knows."""
        if self.val_size and not self.dataset:
            yield Finding("val_size", "splits 'dataset', which is not given")
        if self.val_size and self.eval_dataset:
            yield Finding("val_size", "and 'eval_dataset' exclude each other: keep one")
        if self.val_size > 1 and self.val_size != int(self.val_size):
            yield Finding("val_size", f"should be a whole number or a fraction below 1, found {self.val_size}")
        yield from self._check_mixing()
        try:
            catalogue = read_catalogue(self.dataset_dir, None)
        except UserError as error:
            yield Finding("dataset_dir", f"cannot be used: {error}")
            return
        if catalogue is not None and catalogue.trouble and any(catalogue.needs(name) for name in (*self.dataset, *self.eval_dataset)):
            yield Finding("dataset_dir", f"cannot be used: {catalogue.trouble}")
            return
        for key in ("dataset", "eval_dataset"):
            names = tuple(dict.fromkeys(getattr(self, key)))
            if len(names) < len(getattr(self, key)):
                yield Finding(key, "names a data set twice; it is used once", fatal=False)
            if catalogue is not None:  # else it lies on a hub, and is read when the run begins
                yield from (finding for name in names for finding in check_name(key, name, catalogue, run.method))
        if self.streaming and catalogue is not None:
            yield from self._check_streaming(catalogue, run.loop.max_steps)

    def _check_streaming(self, catalogue: Catalogue, max_steps: int) -> Iterator[Finding]:
        """What a stream cannot be asked for; files of any size on this machine can."""
        names = tuple(dict.fromkeys(self.dataset))
        hub = [name for name in names if catalogue.is_hub(name)]
        if not hub:
            return
        if max_steps <= 0:
            yield Finding("streaming", f"of {hub[0]!r} from a hub needs 'max_steps': a stream does not say how many rows it has")
        if len(names) > 1:
            yield Finding("streaming", f"of {hub[0]!r} from a hub cannot be mixed with other data sets; leave it out")
        if self.val_size:
            yield Finding("streaming", f"of {hub[0]!r} from a hub cannot be split by 'val_size'; give an 'eval_dataset'")

    def _check_mixing(self) -> Iterator[Finding]:
        assert self.mix_strategy in STRATEGIES
        if self.interleave_probs and self.mix_strategy == "concat":
            yield Finding("interleave_probs", "weighs data sets that are interleaved, but 'mix_strategy' is concat")
        if self.interleave_probs and (min(self.interleave_probs) < 0 or sum(self.interleave_probs) <= 0):
            yield Finding("interleave_probs", f"should be weights of 0 or more, not all 0, found {list(self.interleave_probs)}")
        for key in ("dataset", "eval_dataset"):
            count = len(dict.fromkeys(getattr(self, key)))
            if (
                self.interleave_probs
                and count > 1
                and count != len(self.interleave_probs)
                and not (key != "dataset" and self.eval_on_each_dataset)
            ):
                yield Finding(
                    "interleave_probs", f"should have a weight for each of {count} names in {key!r}, found {len(self.interleave_probs)}"
                )


@dataclass
class Sets:
    """The sets of a run; no evaluation set where none was asked for."""

    train: UnitSet | None
    eval: UnitSet | dict[str, UnitSet] | None
    order: Order | None = None  # in which the training set is dealt
    encoder: Encoder | None = None
    claimed: list[Path] = field(default_factory=list)  # folders of stores that this run alone writes

    @property
    def by_name(self) -> dict[str, UnitSet]:
        """Each set by the name that the ledger has for it."""
        several = {f"eval {name}": units for name, units in self.eval.items()} if isinstance(self.eval, dict) else {}
        single = {"eval": self.eval} if self.eval is not None and not isinstance(self.eval, dict) else {}
        return {**({"train": self.train} if self.train is not None else {}), **several, **single}

    def stop(self) -> None:
        """End the encoding."""
        if self.encoder is not None:
            self.encoder.stop()
        while self.claimed:
            release(self.claimed.pop())

    def confirm(self) -> None:
        """Raise what went wrong with the data, once nothing of them is read any more."""
        if self.encoder is not None:
            self.encoder.confirm()

    def __enter__(self) -> Sets:
        return self

    def __exit__(self, *fault: object) -> None:
        self.stop()


def check_name(key: str, name: str, catalogue: Catalogue, method: Any) -> Iterator[Finding]:
    """What is wrong with one name of a data set, before anything is read."""
    try:
        entry = catalogue.entry(name)
    except UserError as error:
        prefix = f"data set {name!r}: "
        yield from (Finding(key, f"names {name!r}: {text.removeprefix(prefix)}") for text in error.complaints)
        return
    if entry is None:
        return  # a path: its records tell the rest
    for fault in stage_faults(entry, method):
        yield Finding(key, f"names {name!r}{fault}")
    local = not (entry.hub or entry.cloud_file_name)
    path = (catalogue.folder or Path()) / str(entry.file_name)
    if local and not (path.exists() or set("*?[") & set(path.name)):
        yield Finding(key, f"names {name!r}, whose file {path} does not exist")


def stage_faults(entry: DatasetEntry, method: Any) -> Iterator[str]:
    """What a stage cannot learn from, said after the data set's name."""
    if entry.ranking != method.ranking:
        kind = "pairs of a better and a worse answer" if method.ranking else "plain answers"
        yield f" with 'ranking: {str(entry.ranking).lower()}', but this stage learns from {kind}"
    for column in ("kto_tag", "images", "videos", "audios"):
        if getattr(entry.columns, column) and column not in method.reads:
            yield f", which has a column for {column!r} that this stage does not read; take it out of the columns"


def load_rows(kind: str, template: Template, options: RowOptions, packing: PackingOptions) -> Rows:
    """What encodes and collates rows of a kind."""
    from finery.data.rows import ROWS

    rows = ROWS[kind]
    return rows(template, options, whole=not rows.answers and packing.packs(False))


@dataclass
class Preparation:
    """What loading needs beside the keys of the data: from the model, the loop and the hubs."""

    rows: Rows
    method: Any
    key: str  # a digest of what else shapes the tokens: tokenizer and template
    seed: int
    download: Mapping[str, Any]  # `cache_dir` and `tokens` for the hubs
    sampling: Sampling = "random"
    order_seed: int = 0
    step_size: int = 1  # samples of a step, all ranks together
    num_steps: int | None = None  # that the run is to do, where it says so
    taken: dict[Path, str] = field(default_factory=dict)  # files whose content was not read now but remembered


def load_sets(options: DataOptions, packing: PackingOptions, prepared: Preparation) -> Sets:
    """Open, mix and split what a run trains and evaluates on, and begin to encode it. Raises `UserError`."""
    from finery.data.content import ContentGuard
    from finery.data.encoder import Encoder, Feed
    from finery.data.storing import open_stores

    sources: list[Source] = []
    parts = {name: part for name, part in _parts(options, prepared, sources) if len(part)}
    if not parts:
        return Sets(None, None)
    streamed = any(source.sequential for source in sources)
    if streamed:
        prepared = replace(prepared, sampling="sequential")  # a stream shuffles by itself
    stores, writes = open_stores(options, prepared, sources)
    samples = {name: _samples(name, part, number, sources, stores, prepared.rows) for number, (name, part) in enumerate(parts.items())}
    packed = packing.packs(prepared.rows.answers)
    first = bool(packed or prepared.sampling == "group_by_length" or options.tokenized_path)
    orders = {name: Sequential(len(part)) if first or name != "train" else _order(prepared, len(part)) for name, part in parts.items()}
    wanted = 1 if streamed else options.preprocessing_num_workers or (num_cores() if first else 1)
    feeds = [Feed(part, orders[name], sources, stores) for name, part in parts.items()]
    encoder = Encoder(prepared.rows, feeds, wanted if writes else 0, ContentGuard(prepared.taken))
    for one in samples.values():
        one.encoder = encoder
    try:
        for name, one in samples.items():
            if first:
                one.encode_all()
            _check_usable(name, one, orders[name])
    except BaseException:
        encoder.stop()
        raise
    if first:
        encoder.stop()
    units = {name: _units(one, packing, packed, name) for name, one in samples.items()}
    return replace(_sets(units, prepared, encoder, packed), claimed=[store.folder for store in stores] if writes else [])


def open_eval(options: DataOptions, prepared: Preparation) -> tuple[dict[str, Part], list[Source]]:
    """What a run evaluates on, by the names of its sets and not encoded: a part tells where its samples lie in the sources."""
    sources: list[Source] = []
    return {name: part for name, part in _parts(options, prepared, sources) if name != "train"}, sources


def _sets(units: Mapping[str, UnitSet], prepared: Preparation, encoder: Encoder, packed: bool) -> Sets:
    train = units.get("train")
    several = {name.removeprefix("eval "): each for name, each in units.items() if name.startswith("eval ")}
    order = None
    if train is not None:
        by_length = prepared.sampling == "group_by_length"
        order = ByLength(train.lengths, prepared.order_seed, 50 * prepared.step_size) if by_length else _order(prepared, len(train))
    return Sets(train, several or units.get("eval"), order, encoder)


def _samples(name: str, part: Part, number: int, sources: Sequence[Source], stores: Any, rows: Rows) -> SampleSet:
    from finery.data.sets import SampleSet

    log.info("%s: %s samples", name, f"{len(part):,}")
    return SampleSet(name, part, sources, stores, rows, number)


def _units(samples: SampleSet, packing: PackingOptions, packed: bool, name: str) -> UnitSet:
    """Packs or blocks where they are asked for. An evaluation's loss is the same in isolated packs: it needs none."""
    from finery.data.sets import BlockSet, PackedSet

    capacity = samples.rows.options.cutoff_len
    if not packed or (name != "train" and samples.rows.answers and not packing.packing_contaminated):
        return samples
    if not samples.rows.answers:
        return BlockSet(samples, capacity)
    return PackedSet(samples, make_packs(*samples.row_lengths(), capacity), capacity, packing.packing_contaminated)


def _order(prepared: Preparation, size: int) -> Order:
    return Sequential(size) if prepared.sampling == "sequential" else Shuffled(size, prepared.order_seed)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parts(options: DataOptions, prepared: Preparation, sources: list[Source]) -> Iterator[tuple[str, Part]]:
    """The samples of each set, by name; `sources` gets the data sets, each once."""
    catalogue = read_catalogue(options.dataset_dir, prepared.download) or Catalogue()
    numbers: dict[str, int] = {}

    def mixture(names: Sequence[str], seed: int, stream: StreamSettings | None = None) -> Mixture:
        names = tuple(dict.fromkeys(names))
        for name in names:
            if name not in numbers:
                numbers[name] = len(sources)
                sources.append(_open(name, options, prepared, replace(catalogue, stream=stream)))
        own = [numbers[name] for name in names]
        _check_streams([sources[number] for number in own], options)
        selections = [_selection(sources[number], options, mix(prepared.seed, number)) for number in own]
        if any(own[place] != place for place in range(len(own))):
            return _Renumbered(selections, options, seed, own)
        return Mixture(selections, options.mix_strategy, options.interleave_probs if len(own) > 1 else (), seed)

    train = mixture(options.dataset, prepared.seed, _stream(options, prepared)) if options.dataset else None
    if train is not None and options.val_size:
        rest, held = hold_out(train, options.val_size, prepared.seed)
        yield "train", rest
        yield "eval", held
    elif train is not None:
        yield "train", Part(train)
    if options.eval_dataset and options.eval_on_each_dataset:
        for name in dict.fromkeys(options.eval_dataset):
            yield f"eval {name}", Part(mixture([name], prepared.seed))
    elif options.eval_dataset:
        yield "eval", Part(mixture(options.eval_dataset, prepared.seed))


def _stream(options: DataOptions, prepared: Preparation) -> StreamSettings | None:
    """How training sets on a hub are streamed, if they are; those to evaluate on are always fetched."""
    rows = prepared.num_steps * prepared.step_size if prepared.num_steps else None
    settings = StreamSettings(rows, options.buffer_size, prepared.order_seed, prepared.sampling != "sequential")
    return settings if options.streaming else None


def _check_streams(sources: Sequence[Source], options: DataOptions) -> None:
    """A stream cannot be mixed, since its end is not known, nor can a part of it be held out."""
    for source in sources:
        if source.sequential and (len(sources) > 1 or options.val_size):
            wrong = "mixed with others" if len(sources) > 1 else "split by 'val_size'"
            raise UserError(f"data set {source.name!r} is streamed, so it cannot be {wrong}; leave 'streaming' out")


class _Renumbered(Mixture):
    """A mixture of sources that are not the first ones of the run's list."""

    def __init__(self, selections: Sequence[Selection], options: DataOptions, seed: int, numbers: Sequence[int]) -> None:
        super().__init__(selections, options.mix_strategy, options.interleave_probs if len(numbers) > 1 else (), seed)
        self.numbers = np.asarray(numbers, np.int64)

    def locate(self, places: Any) -> tuple[Any, Any]:
        """With the numbers of the run's list."""
        sources, rows = super().locate(places)
        return self.numbers[sources], rows


def _open(name: str, options: DataOptions, prepared: Preparation, catalogue: Catalogue) -> Source:
    source = open_source(name, catalogue, prepared.download, options.placeholders, prepared.taken, options.overwrite_cache)
    if faults := [f"data set {name!r}{fault}" for fault in stage_faults(source.entry, prepared.method)]:
        raise UserError(*faults)
    return source


def _selection(source: Source, options: DataOptions, seed: int) -> Selection:
    first, size = source.part()
    if not size:
        raise UserError(f"data set {source.name!r}: its split {source.entry.split!r} holds no records")
    return Selection(first, size, source.entry.num_samples, options.max_samples, seed)


def _check_usable(name: str, samples: SampleSet, order: Order) -> None:
    """Raise `UserError` where none of the first samples dealt yields a row."""
    tried = order.at(0, 0, NUM_TRIED)
    samples.begin(0)
    reasons: dict[str, str] = {}
    for start in range(0, len(tried), 64):
        samples.advance(start, 64)
        for place in tried[start : start + 64].tolist():
            if samples.of_sample(place):
                return
            source, record = samples.locate(place)
            reasons.setdefault(
                samples.stores[source].reason(record), f"{samples.sources[source].name}, {samples.sources[source].place(record)}"
            )
    told = [f"{reason} ({where})" for reason, where in list(reasons.items())[:5]]
    which = f"none of the {len(tried):,} samples" if len(tried) == len(samples) else f"none of the first {len(tried):,} samples dealt"
    purpose = "train" if name == "train" else "evaluate"
    raise UserError(f"no row is left to {purpose} on: {which} can be used: {'; '.join(told)}")
