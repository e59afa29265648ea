"""What a run trains on, sample by sample or step by step, through the code that training uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finery.data.load import Sets, load_rows, load_sets
from finery.data.rows.base import IGNORED, Cut, Row
from finery.data.sets import BlockSet, PackedSet, SampleSet, UnitSet
from finery.errors import UserError, suggestion
from finery.run import Run

_PIECE = 1 << 16


@dataclass(frozen=True)
class Shown:
    """One sample, or one row of a step, as `finery show --json` writes it."""

    where: dict[str, Any]  # set, dataset, file and row; of a step also its number and the unit's
    rows: Sequence[Row]
    text: str = ""
    cut: int = 0
    lost: tuple[str, ...] = ()  # what the cut took beside text
    reason: str = ""
    beside: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All rows laid end to end; `segments` numbers them, positions begin anew in each."""
        rows = self.rows
        return {
            **self.where,
            "input_ids": [id for row in rows for id in row.ids.tolist()],
            "labels": [label for row in rows for label in row.labels.tolist()],
            "position_ids": [place for row in rows for place in positions(row).tolist()],
            "segments": [number for number, row in enumerate(rows) for _ in range(len(row.ids))],
            "text": self.text,
            "cut": self.cut,
            "lost": list(self.lost),
            "reason": self.reason,
            **self.beside,
        }


def lost(cut: int) -> tuple[str, ...]:
    """What the flags of a cut say."""
    said = {Cut.HEADER_LOST: "the header of a turn", Cut.END_LOST: "an end of turn"}
    return tuple(words for flag, words in said.items() if cut & flag)


def positions(row: Row) -> NDArray[np.int32]:
    """A row's position ids."""
    return np.arange(len(row.ids), dtype=np.int32) if row.positions is None else row.positions


class Preview:
    """The sets of a run, and ways to look at them."""

    def __init__(self, run: Run) -> None:
        from finery.models.load import locate_model
        from finery.models.tokenizer import load_tokenizer
        from finery.training.preparation import prepare, run_rows, run_template

        self.run = run
        base = locate_model(run.model)
        self.tokenizer: Any = load_tokenizer(base, run.model.trust_remote_code)
        self.template = run_template(run, self.tokenizer)
        rows = load_rows(run.method.rows, self.template, run_rows(run, base), run.packing)
        self.prepared = prepare(run.loop, run.trainer, run.model.download, rows, run.method)
        self.sets: Sets = load_sets(run.data, run.packing, self.prepared)

    def decode(self, ids: Any) -> str:
        """Text of token ids, special tokens written out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def samples(self, dataset: str | None = None, row: int | None = None) -> Iterator[Shown]:
        """Samples in the order of the files; of one data set, or one row of it. Raises `UserError` for what there is not."""
        names = list(dict.fromkeys(source.name for units in self.sets.by_name.values() for source in units.samples.sources))
        if dataset is not None and dataset not in names:
            raise UserError(f"--dataset: this run has no data set {dataset!r}{suggestion(dataset, names)}; it has: {', '.join(names)}")
        found = False
        for number, name in enumerate(names):
            if dataset not in (None, name):
                continue
            for set_name, units, record, place in self._records(number):
                if row is None or units.samples.sources[number].file_row(record)[1] == row:
                    found = True
                    yield self._sample(set_name, units, place)
        if not found:
            what = f"row {row}" if row is not None else "a row"
            raise UserError(
                f"--row: no set of this run takes {what} of {dataset or ', '.join(names)}; rows are counted from 0 in each file"
            )

    def _records(self, number: int) -> Iterator[tuple[str, UnitSet, int, int]]:
        """Each record of a data set that some set takes, once: the set, the record, and its place there."""
        taken = []
        for set_number, units in enumerate(self.sets.by_name.values()):
            part = units.samples.part
            for start in range(0, len(part), _PIECE):
                sources, records = part.locate(np.arange(start, min(start + _PIECE, len(part)), dtype=np.int64))
                places = np.flatnonzero(sources == number)
                taken.append(np.stack([records[places], np.full(len(places), set_number), places + start], axis=1))
        every = np.concatenate(taken)
        every = every[np.lexsort((every[:, 2], every[:, 1], every[:, 0]))]
        sets = list(self.sets.by_name.items())
        last = -1
        for record, set_number, place in every:
            if record != last:
                last = record
                yield *sets[set_number], int(record), int(place)

    def _sample(self, set_name: str, units: UnitSet, place: int) -> Shown:
        samples = units.samples
        encoded = samples.encode_now(place)
        beside = {"packs": units.packs_of(place)} if isinstance(units, PackedSet) else {}
        text = self.decode([id for row in encoded.rows for id in row.ids.tolist()])
        return Shown(self._where(set_name, samples, place), encoded.rows, text, encoded.num_cut, lost(encoded.cut), encoded.reason, beside)

    @staticmethod
    def _where(set_name: str, samples: SampleSet, place: int) -> dict[str, Any]:
        source, record = samples.locate(place)
        file, row = samples.sources[source].file_row(record)
        return {"set": set_name, "dataset": samples.sources[source].name, "file": str(file), "row": row}

    def step(self, number: int) -> Iterator[Shown]:
        """The rows that the optimizer step `number` (from 1) holds, all ranks together, in the order in which they are dealt."""
        from finery.training.sampler import StepSampler

        units, order, size = self.sets.train, self.sets.order, self.prepared.step_size
        if units is None or order is None:
            raise UserError("--step: this run trains on nothing: give 'dataset'")
        whole = len(StepSampler(order, size, drop_last=bool(self.run.trainer.get("dataloader_drop_last"))))
        loop = self.run.loop
        last = loop.max_steps if loop.max_steps > 0 else math.ceil(loop.num_train_epochs * whole)
        if not 1 <= number <= last:
            raise UserError(f"--step: this run does {last} steps, counted from 1, found {number}")
        epoch, inside = divmod(number - 1, whole)
        units.begin(epoch * order.size + inside * size)
        units.advance(epoch * order.size + inside * size, size)
        for unit in order.at(epoch, inside * size, (inside + 1) * size).tolist():
            for place, row in enumerate(units[unit]):
                where = {"step": number, "unit": unit, **self._members(units, unit, place)}
                yield Shown(where, [row], self.decode(row.ids.tolist()))

    def _members(self, units: UnitSet, unit: int, place: int) -> dict[str, Any]:
        if isinstance(units, BlockSet):
            return {"set": "train", "dataset": None, "row": None}
        if isinstance(units, PackedSet):
            samples = [int(sample) for sample, _ in units.packs[unit]]
            if not units.joined:
                return self._where("train", units.samples, samples[place])
            return {"set": "train", "rows": [self._where("train", units.samples, sample) for sample in samples]}
        return self._where("train", units.samples, unit)


def spans(row: Row) -> Iterator[tuple[bool, NDArray[np.int32]]]:
    """The stretches of a row that are learnt or not, in turn."""
    learnt = row.labels != IGNORED
    edges = [0, *(np.flatnonzero(learnt[1:] != learnt[:-1]) + 1).tolist(), len(row.ids)]
    for start, end in pairwise(edges):
        if end > start:
            yield bool(learnt[start]), row.ids[start:end]
