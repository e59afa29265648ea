"""Packing: best-fit decreasing over the whole set, rows that do or do not see each other, and blocks of one long text."""

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finery.data.load import Sets
from finery.data.packing import PackingOptions, best_fit, make_packs
from finery.data.rows.base import Row, pad
from finery.data.sets import BlockSet, PackedSet, SampleSet
from finery.methods.base import next_token_loss
from finery.models.head import teach
from letters import Answers, letter_rows, open_sets, spell, write_texts

Lengths = Any


def naive(lengths: Lengths, capacity: int) -> int:
    """How many packs best-fit decreasing needs, one row after the other."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        place = bisect.bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else max(capacity, length)
        bisect.insort(rooms, room - length)
    return len(rooms)


def check(lengths: Lengths, capacity: int) -> int:
    """Every row is in a pack, none is over capacity; returns how many packs there are."""
    packs = best_fit(lengths, capacity)
    tokens, rows = np.bincount(packs, weights=lengths), np.bincount(packs)
    assert len(packs) == len(lengths)
    assert rows.min() > 0, "packs are numbered without gaps"
    assert ((tokens <= capacity) | (rows == 1)).all()
    firsts = np.unique(packs, return_index=True)[1]
    assert (np.diff(firsts) > 0).all(), "packs are numbered by their first row"
    return len(rows)


def many() -> Iterator[tuple[Lengths, int]]:
    """Lengths of many kinds, with their capacity."""
    dice = np.random.default_rng(0)
    for turn in range(600):
        capacity, count = int(dice.integers(1, 90)), int(dice.integers(1, 120))
        kinds = (
            dice.integers(1, capacity + 1, count),
            np.minimum(dice.geometric(0.1, count), capacity),
            dice.choice(np.unique(dice.integers(1, capacity + 1, 3)), count),  # few lengths, each often
            np.maximum(capacity // dice.integers(1, 6, count), 1),
        )
        yield kinds[turn % len(kinds)].astype(np.int32), capacity


def test_as_many_packs_as_the_plain_way_needs() -> None:
    for lengths, capacity in many():
        assert check(lengths, capacity) == naive(lengths, capacity), (lengths.tolist(), capacity)


def test_rows_of_one_length_fill_a_pack_before_the_next() -> None:
    """Else the four rows of 30 would stand by twos, and the 12 would find no room."""
    lengths = np.array([30, 30, 30, 30, 29, 29, 12], np.int32)
    assert best_fit(lengths, 100).tolist() == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("capacity", [512, 4096])
def test_packs_are_nearly_full(capacity: int) -> None:
    dice = np.random.default_rng(1)
    for lengths in (
        np.clip(dice.lognormal(4.5, 1, 20_000), 4, capacity).astype(np.int32),
        dice.integers(1, capacity + 1, 20_000).astype(np.int32),
    ):
        bound = max(-(-int(lengths.sum()) // capacity), int((lengths > capacity / 2).sum()))
        assert check(lengths, capacity) <= 1.01 * bound


def test_a_row_longer_than_a_pack_stands_alone() -> None:
    assert best_fit(np.array([50, 8, 50, 2], np.int32), 10).tolist() == [0, 1, 2, 1]


def test_packs_keep_the_order_of_the_files() -> None:
    lengths = np.array([4, 9, 5, 1, 6], np.int32)
    packs = make_packs(np.array([0, 0, 1, 2, 3]), np.array([0, 1, 0, 0, 0], np.int32), lengths, 10)
    members = [packs[pack].tolist() for pack in range(len(packs))]
    assert members == [[[0, 0], [3, 0]], [[0, 1], [2, 0]], [[1, 0]]]
    assert packs.lengths.tolist() == [10, 10, 5]


def texts(count: int, seed: int = 0, most: int = 40) -> list[str]:
    """Different texts of random length."""
    dice = np.random.default_rng(seed)
    return ["".join(map(chr, dice.integers(97, 123, dice.integers(2, most)))) for _ in range(count)]


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A registry of one data set of 90 texts."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    return {"x": write_texts(tmp_path / "x.jsonl", texts(90))}


def pack(entry: dict[str, Any], **options: Any) -> Sets:
    """Load with packing, as a stage that learns from answers."""
    truncation = {key: options.pop(key) for key in ("truncation", "cutoff_len") if key in options}
    return open_sets(entry, letter_rows(**{"cutoff_len": 64, **truncation}, kind=Answers), PackingOptions(**options))


def total_loss(model: Any, parts: list[list[Row]]) -> float:
    """The sum of the losses of all tokens."""
    with torch.no_grad():
        return sum(float(next_token_loss(model, pad(rows)).total) for rows in parts)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """The tiny model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_model)).eval()
    teach(model)
    return model


@pytest.mark.parametrize("key", ["packing", "neat_packing"])
def test_isolated_packs_have_the_loss_of_their_rows(entry: dict[str, Any], model: Any, key: str) -> None:
    packed, plain = pack(entry, **{key: True}).train, pack(entry, packing=False).train
    assert isinstance(packed, PackedSet)
    assert isinstance(plain, SampleSet)
    units = [packed[unit] for unit in range(len(packed))]
    assert len(units) < len(plain) / 2
    assert all(sum(len(row.ids) for row in rows) == length <= 64 for rows, length in zip(units, packed.lengths.tolist(), strict=True))
    plain.advance(0, len(plain))
    alone = [plain[unit] for unit in range(len(plain))]
    assert sorted(spell(row for rows in units for row in rows)) == sorted(spell(row for rows in alone for row in rows)) == sorted(texts(90))
    assert total_loss(model, units) == pytest.approx(total_loss(model, alone), rel=1e-5)


def test_contaminated_packs_are_one_row_whose_positions_restart(entry: dict[str, Any], model: Any) -> None:
    isolated, joined = pack(entry, packing=True).train, pack(entry, packing_contaminated=True).train
    assert isinstance(isolated, PackedSet)
    assert isinstance(joined, PackedSet)
    assert len(isolated) == len(joined)
    for unit in range(len(joined)):
        rows = isolated[unit]
        (row,) = joined[unit]
        assert row.ids.tolist() == [id for part in rows for id in part.ids.tolist()]
        assert row.positions is not None
        assert row.positions.tolist() == [place for part in rows for place in range(len(part.ids))]
    batch = pad(joined[0])
    assert batch["position_ids"].tolist()[0] == joined[0][0].positions.tolist()  # type: ignore[union-attr]
    first, rest = isolated[0][0], isolated[0][1:]
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, : len(first.ids)] = 5
    with torch.no_grad():
        logits = [model(**{key: each[key] for key in ("input_ids", "attention_mask", "position_ids")}).logits for each in (batch, changed)]
    seen = (logits[0] - logits[1])[0, len(first.ids) :]
    assert rest
    assert seen.abs().max() > 1e-4, "later rows see those before them"


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "split", "drop", "proportional"])
def test_no_row_is_longer_than_a_pack(entry: dict[str, Any], truncation: str) -> None:
    packed = pack(entry, packing=True, truncation=truncation, cutoff_len=17).train
    assert isinstance(packed, PackedSet)
    assert packed.lengths.max() <= 17
    rows = [row for unit in range(len(packed)) for row in packed[unit]]
    assert int(packed.lengths.sum()) == sum(len(row.ids) for row in rows)
    if truncation == "split":
        ends = {text[start : start + 17] for text in texts(90) for start in range(0, len(text), 17)}
        assert sorted(spell(rows)) == sorted(end for end in ends if len(end) > 1)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_sample_that_yields_several(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lengths are their own, wherever they stand."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    entry = {"x": write_texts(tmp_path / "x.jsonl", ["", *texts(300, seed, most=60), ""])}
    packed = pack(entry, packing=True, truncation="split", cutoff_len=13).train
    assert isinstance(packed, PackedSet)
    samples, numbers, lengths = packed.samples.row_lengths()
    rows = [packed.samples.of_sample(sample)[number] for sample, number in zip(samples.tolist(), numbers.tolist(), strict=True)]
    assert lengths.tolist() == [len(row.ids) for row in rows]
    assert len(rows) == sum(len(packed.samples.of_sample(sample)) for sample in range(302))


@pytest.mark.parametrize("capacity", [2, 5, 7, 64, 5000])
def test_blocks_lose_no_token(entry: dict[str, Any], capacity: int) -> None:
    """For pretraining: all texts laid end to end, in the files' order, cut every so many tokens."""
    blocks = open_sets(entry, letter_rows(cutoff_len=capacity, whole=True), PackingOptions()).train
    assert isinstance(blocks, BlockSet)
    rows = [row for unit in range(len(blocks)) for row in blocks[unit]]
    whole = "".join(texts(90))
    rest = len(whole) % capacity
    assert "".join(spell(rows)) == (whole[:-1] if rest == 1 else whole), "one token alone has nothing to be predicted from"
    assert [len(row.ids) for row in rows] == [capacity] * (len(whole) // capacity) + [rest] * (rest > 1)
    assert blocks.lengths.tolist() == [capacity] * (len(whole) // capacity) + [rest] * (rest > 0)
    assert all(np.array_equal(row.ids, row.labels) and row.positions is None for row in rows)


def test_blocks_of_mixed_sets_and_texts_that_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    entries = {
        "a": write_texts(tmp_path / "a.jsonl", ["", "aa", "", "aaa"]),
        "b": write_texts(tmp_path / "b.jsonl", ["bbbbbbbbbbb", "", "b"]),  # 17 letters in all: the last one is alone
    }
    found = {}
    for strategy in ("concat", "interleave_once"):
        rows = letter_rows(cutoff_len=4, whole=True)
        blocks: Any = open_sets(entries, rows, PackingOptions(), mix_strategy=strategy).train
        found[strategy] = [text for unit in range(len(blocks)) for text in spell(blocks[unit])]
    assert found == {"concat": ["aaaa", "abbb", "bbbb", "bbbb"], "interleave_once": ["bbbb", "bbbb", "bbba", "abaa"]}
