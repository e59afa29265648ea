"""The ledger: what became of every record, in numbers, as a table and as data_report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finery.data.encoder import kind_of
from finery.data.rows.base import Cut
from finery.data.sets import BlockSet, PackedSet, SampleSet, UnitSet
from finery.log import plural

FILE = "data_report.json"
QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_PIECE = 1 << 16
_NUM_FIRST = 5
"""So many row numbers are named for each reason."""
_MOST_KINDS = 100
"""From then on reasons are no longer told apart."""
_OTHERS = "other reasons, each of a kind of its own"
_MOST_TOLD = 20


@dataclass
class _Count:
    """What one data set gave to one set."""

    files: list[str]
    taken: int = 0  # samples that the set has of it
    seen: int = 0
    used: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    cut: int = 0
    samples_cut: int = 0
    lost_ends: int = 0
    lost_headers: int = 0
    trailing: int = 0
    per_turn: int = 0
    first_cut: list[str] = field(default_factory=list)
    left_out: dict[str, list[Any]] = field(default_factory=dict)  # by kind: the first reason, count, first places
    lengths: list[NDArray[np.int32]] = field(default_factory=list)
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)
    records: list[NDArray[np.int64]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As data_report.json has it."""
        lengths = np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int32)
        quantiles = {name: int(np.quantile(lengths, q, method="nearest")) for name, q in QUANTILES.items()} if len(lengths) else {}
        return {
            "files": self.files,
            "samples": self.taken,
            "seen": self.seen,
            "used": self.used,
            "left_out": [{"reason": reason, "samples": count, "first": first} for reason, count, first in self.left_out.values()],
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "cut_tokens": self.cut,
            "cut_samples": self.samples_cut,
            "first_cut": self.first_cut,
            "lost_ends_of_turn": self.lost_ends,
            "lost_headers": self.lost_headers,
            "without_trailing_messages": self.trailing,
            "samples_of_one_row_per_turn": self.per_turn,
            "tokens_of_a_sample": quantiles,
        }


def report(sets: Mapping[str, UnitSet]) -> dict[str, Any]:
    """What is known of each set, by its name; complete once every sample was encoded."""
    found: dict[str, Any] = {}
    hashes: dict[str, NDArray[np.uint64]] = {}
    for name, units in sets.items():
        counts = count(units.samples)
        seen, taken = sum(each.seen for each in counts.values()), len(units.samples)
        complete = seen == taken
        found[name] = {
            "complete": complete,
            "samples": taken,
            "seen": seen,
            **({} if complete else {"partial": f"{seen} of {taken} samples seen"}),
            "data_sets": {source: each.as_dict() for source, each in counts.items()},
        }
        if (fill := packing_fill(units)) is not None:
            found[name]["packing"] = fill
        if complete:
            hashes[name] = _distinct(counts)
            values, times = np.unique(hashes[name], return_counts=True)
            found[name]["duplicates"] = int((times - 1).sum())
            hashes[name] = values
    for name in hashes:
        if name != "train" and "train" in hashes:
            found[name]["also_in_train"] = len(np.intersect1d(hashes["train"], hashes[name], assume_unique=True))
    return found


def count(samples: SampleSet) -> dict[str, _Count]:
    """What became of the samples that are encoded so far, by data set."""
    counts = {source.name: _Count([str(table.told_as) for table in source.tables]) for source in samples.sources}
    for start in range(0, len(samples), _PIECE):
        sources, records = samples.part.locate(np.arange(start, min(start + _PIECE, len(samples)), dtype=np.int64))
        for number, source in enumerate(samples.sources):
            inside = records[sources == number]
            if len(inside):
                _add(counts[source.name], samples, number, inside)
    return {name: each for name, each in counts.items() if each.taken}


def _add(total: _Count, samples: SampleSet, number: int, records: NDArray[np.int64]) -> None:
    source, store = samples.sources[number], samples.stores[number]
    entries = store.entries[records]
    present = entries["present"] == 1
    store.let_go()
    total.taken += len(records)
    records, entries = records[present], entries[present]
    used = entries["num_rows"] > 0
    total.seen += len(records)
    total.used += int(used.sum())
    for name, column in (("rows", "num_rows"), ("tokens", "num_ids"), ("supervised", "num_supervised"), ("cut", "num_cut")):
        setattr(total, name, getattr(total, name) + int(entries[column].sum(dtype=np.int64)))
    cut = entries["num_cut"] > 0
    total.samples_cut += int(cut.sum())
    flags = {"lost_ends": Cut.END_LOST, "lost_headers": Cut.HEADER_LOST, "trailing": Cut.TRAILING, "per_turn": Cut.PER_TURN}
    for name, flag in flags.items():
        setattr(total, name, getattr(total, name) + int((entries["cut"] & flag > 0).sum()))
    for record in records[cut][: _NUM_FIRST - len(total.first_cut)]:
        total.first_cut.append(source.place(int(record)))
    for record in records[~used].tolist():
        reason = store.reason(record)
        kind = kind_of(reason)
        if kind not in total.left_out and len(total.left_out) >= _MOST_KINDS:
            kind = reason = _OTHERS
        line = total.left_out.setdefault(kind, [reason, 0, []])
        line[1] += 1
        if len(line[2]) < _NUM_FIRST:
            line[2].append(source.place(record))
    total.lengths.append(entries["num_ids"][used])
    total.hashes.append(entries["hash"][used])
    total.records.append(records[used])


def _distinct(counts: Mapping[str, _Count]) -> NDArray[np.uint64]:
    """The hash of every record once, however often it is dealt."""
    parts = []
    for each in counts.values():
        _, first = np.unique(np.concatenate(each.records), return_index=True) if each.records else (0, np.zeros(0, np.int64))
        if each.records:
            parts.append(np.concatenate(each.hashes)[first])
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def packing_fill(units: UnitSet) -> dict[str, Any] | None:
    """How full packs are, or nothing where a unit is a sample."""
    if isinstance(units, SampleSet):
        return None
    kind = "blocks" if isinstance(units, BlockSet) else "packs"
    tokens, capacity = int(units.lengths.sum()), units.capacity
    left = {"left_over_tokens": 1} if isinstance(units, BlockSet) and len(units) and units.lengths[-1] == 1 else {}
    joined = {"rows_see_each_other": units.joined} if isinstance(units, PackedSet) else {}
    return {
        kind: len(units),
        "capacity": capacity,
        "fill": round(tokens / (len(units) * capacity), 4) if len(units) else 0.0,
        **joined,
        **left,
    }


def table(found: Mapping[str, Any]) -> str:
    """A report as lines for people."""
    head = ("", "samples", "used", "left out", "rows", "tokens", "learnt", "cut", "median", "p99", "longest")
    lines: list[tuple[str, ...]] = [head]
    notes: list[str] = []
    for name, each in found.items():
        for source, line in each["data_sets"].items():
            size = line["tokens_of_a_sample"]
            share = f"{line['supervised_tokens'] / line['tokens']:.0%}" if line["tokens"] else "-"
            seen = f"{line['seen']:,}" + ("" if line["seen"] == line["samples"] else f" of {line['samples']:,}")
            numbers = [line["used"], line["seen"] - line["used"], line["rows"], line["tokens"]]
            quantiles = [size.get(name, 0) for name in ("median", "p99", "max")]
            texts = [f"{number:,}" for number in (line["cut_tokens"], *quantiles)]
            lines.append((f"{name}: {source}", seen, *[f"{number:,}" for number in numbers], share, *texts))
            notes += _notes(f"{name}: {source}", line)
        notes += _set_notes(name, each)
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    rows = ["  ".join([line[0].ljust(widths[0]), *(line[n].rjust(widths[n]) for n in range(1, len(head)))]).rstrip() for line in lines]
    return "\n".join([*rows, *notes])


def _notes(name: str, line: Mapping[str, Any]) -> list[str]:
    notes = []
    for reason in line["left_out"][:_MOST_TOLD]:
        more = ", …" if reason["samples"] > len(reason["first"]) else ""
        notes.append(f"{name}: {reason['samples']:,} left out: {reason['reason']} ({', '.join(reason['first'])}{more})")
    if len(line["left_out"]) > _MOST_TOLD:
        rest = line["left_out"][_MOST_TOLD:]
        num_samples = sum(reason["samples"] for reason in rest)
        notes.append(f"{name}: {num_samples:,} left out for {plural(len(rest), 'other reason')}, see {FILE}")
    if line["cut_samples"]:
        lost = [
            f"{line[key]:,} {what}"
            for key, what in (("lost_ends_of_turn", "lost an end of turn"), ("lost_headers", "lost the header of a turn"))
            if line[key]
        ]
        more = ", …" if line["cut_samples"] > len(line["first_cut"]) else ""
        told = f"; {', '.join(lost)}" if lost else ""
        notes.append(f"{name}: {plural(line['cut_samples'], 'sample')} cut{told} ({', '.join(line['first_cut'])}{more})")
    if line["samples_of_one_row_per_turn"]:
        told = f"{line['samples_of_one_row_per_turn']:,} of {line['used']:,} as one row per answer, since the template rewrites history"
        notes.append(f"{name}: samples trained {told}")
    if line["without_trailing_messages"]:
        notes.append(f"{name}: samples whose last messages no answer follows, which are not read: {line['without_trailing_messages']:,}")
    return notes


def _set_notes(name: str, each: Mapping[str, Any]) -> list[str]:
    notes = []
    if "partial" in each:
        notes.append(f"{name}: partial: {each['partial']}")
    if packing := each.get("packing"):
        kind = "blocks" if "blocks" in packing else "packs"
        notes.append(f"{name}: {packing[kind]:,} {kind} of {packing['capacity']:,} tokens, {packing['fill']:.1%} full")
        if packing.get("left_over_tokens"):
            notes.append(f"{name}: the last token of all stands in a block of its own, where there is nothing to predict it from")
    if each.get("duplicates"):
        notes.append(f"{name}: samples that repeat another one: {each['duplicates']:,}")
    if each.get("also_in_train"):
        notes.append(f"{name}: samples that are in the training set, too: {each['also_in_train']:,}")
    return notes


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Write data_report.json."""
    text = json.dumps({"complete": all(each["complete"] for each in found.values()), "sets": found}, ensure_ascii=False, indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
