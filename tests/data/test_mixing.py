"""Mixing: the same samples in the same order as `datasets` gives, drawing, and holding out."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets, interleave_datasets

from finery.data.mixing import Mixture, Part, Selection, hold_out
from finery.errors import UserError
from letters import in_order, open_sets, write_texts

STOPPING: dict[str, Any] = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}
SIZES = [(3,), (5, 5), (3, 6), (6, 3), (1, 9, 4), (7, 2, 7, 30), (40, 3000)]


def pairs(mixture: Mixture | Part) -> list[tuple[int, int]]:
    """Data set and row at each place."""
    sources, rows = mixture.locate(np.arange(len(mixture), dtype=np.int64))
    return list(zip(sources.tolist(), rows.tolist(), strict=True))


def selections(sizes: tuple[int, ...]) -> list[Selection]:
    """All rows of data sets of these sizes."""
    return [Selection(0, size) for size in sizes]


def theirs(sizes: tuple[int, ...], strategy: str, probs: list[float] | None, seed: int) -> list[tuple[int, int]]:
    """What `datasets` gives."""
    tables = [Dataset.from_dict({"set": [number] * size, "row": list(range(size))}) for number, size in enumerate(sizes)]
    if strategy == "concat" or len(tables) == 1:
        whole = concatenate_datasets(tables)
    else:
        whole = interleave_datasets(tables, probabilities=probs, seed=seed, stopping_strategy=STOPPING[strategy])
    return list(zip(whole["set"], whole["row"], strict=True))


@pytest.mark.parametrize("strategy", ["concat", *STOPPING])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_same_as_datasets(sizes: tuple[int, ...], strategy: str) -> None:
    assert pairs(Mixture(selections(sizes), strategy)) == theirs(sizes, strategy, None, 0)


@pytest.mark.parametrize("strategy", STOPPING)
@pytest.mark.parametrize("seed", [0, 1, 42])
@pytest.mark.parametrize(
    ("sizes", "probs"),
    [((5, 5), [0.5, 0.5]), ((3, 60), [0.9, 0.1]), ((60, 3), [0.9, 0.1]), ((40, 3000), [0.5, 0.5]), ((9, 4, 30), [0.2, 0.2, 0.6])],
)
def test_the_same_as_datasets_with_weights(sizes: tuple[int, ...], probs: list[float], strategy: str, seed: int) -> None:
    assert pairs(Mixture(selections(sizes), strategy, probs, seed)) == theirs(sizes, strategy, probs, seed)


def test_weights_need_not_sum_to_one() -> None:
    ours = [pairs(Mixture(selections((50, 70)), "interleave_over", probs, 3)) for probs in ((0.3, 0.7), (3, 7))]
    assert ours[0] == ours[1]


def test_a_data_set_without_weight_is_never_drawn_and_never_waited_for() -> None:
    for strategy in STOPPING:
        found = pairs(Mixture(selections((5, 9, 7)), strategy, (1, 0, 2), 1))
        assert {source for source, _ in found} == {0, 2}
    assert pairs(Mixture(selections((5, 9)), "interleave_once", (1, 0), 1)) == [(0, row) for row in range(5)]


def test_weight_for_a_data_set_without_rows_is_an_error() -> None:
    with pytest.raises(UserError, match="'interleave_probs' gives weight to a data set that has no rows"):
        Mixture(selections((5, 0)), "interleave_under", (0.5, 0.5), 1)


@pytest.mark.parametrize("strategy", ["interleave_over", "interleave_once"])
def test_a_weight_that_would_never_be_done_is_an_error(strategy: str) -> None:
    with pytest.raises(UserError, match=r"'interleave_probs': with a weight of 1e-09, all 50 rows of data set 2 would come only after"):
        Mixture([Selection(0, 5), Selection(0, 50)], strategy, [1, 1e-9])


def test_places_are_located_alone_as_they_are_together() -> None:
    dice = np.random.default_rng(0)
    for strategy in ("concat", *STOPPING):
        for probs in ((), (0.2, 0.5, 0.3)):
            if strategy == "concat" and probs:
                continue
            mixture = Mixture([Selection(3, 20), Selection(0, 8, 30, seed=5), Selection(1, 50, most=9)], strategy, probs, 11)
            whole = pairs(mixture)
            some = dice.integers(0, len(mixture), 40)
            sources, rows = mixture.locate(some)
            assert list(zip(sources.tolist(), rows.tolist(), strict=True)) == [whole[place] for place in some]


@pytest.mark.parametrize("count", [1, 7, 20, 33, 60])
def test_drawn_rows_come_equally_often(count: int) -> None:
    found = Selection(100, 20, count, seed=3).rows(np.arange(count, dtype=np.int64)).tolist()
    assert len(found) == count
    times = Counter(found)
    assert set(times) <= set(range(100, 120))
    assert max(times.values()) - min(times[row] for row in range(100, 120)) <= 1  # none again before all were drawn
    if count >= 40:
        assert found[:20] != found[20:40], "each turn has an order of its own"
    assert found != Selection(100, 20, count, seed=4).rows(np.arange(count, dtype=np.int64)).tolist() or count == 1


def test_the_most_is_taken_of_what_is_drawn() -> None:
    whole = Selection(0, 50, 30, seed=1)
    first = Selection(0, 50, 30, most=10, seed=1)
    assert len(first) == 10
    assert first.rows(np.arange(10)).tolist() == whole.rows(np.arange(30)).tolist()[:10]
    assert len(Selection(0, 5, most=10)) == 5


@pytest.mark.parametrize(("size", "count"), [(0.25, 5), (0.01, 1), (3, 3), (1, 1), (1.0, 1), (19, 19), (0.5, 10)])
def test_holding_out_is_disjoint_and_complete(size: float, count: int) -> None:
    mixture = Mixture(selections((8, 12)), "interleave_once")
    rest, held = hold_out(mixture, size, 7)
    assert len(held) == count
    assert sorted(pairs(rest) + pairs(held)) == sorted(pairs(mixture))
    order = {pair: place for place, pair in enumerate(pairs(mixture))}
    for part in (rest, held):
        places = [order[pair] for pair in pairs(part)]
        assert places == sorted(places)
    assert pairs(hold_out(mixture, size, 7)[1]) == pairs(held)
    assert any(pairs(hold_out(mixture, size, seed)[1]) != pairs(held) for seed in range(5))


def test_every_sample_is_held_out_equally_often() -> None:
    mixture = Mixture(selections((40,)))
    times = Counter(row for seed in range(400) for _, row in pairs(hold_out(mixture, 0.25, seed)[1]))
    expected = 100.0
    statistic = sum((times[row] - expected) ** 2 / expected for row in range(40))
    assert statistic < 80, f"{statistic:.0f}"  # 30 on the average (drawn without replacement), 80 with a chance below 1e-5


def test_something_must_be_left_to_train_on() -> None:
    with pytest.raises(UserError, match="'val_size' takes 20 of 20 samples and leaves none to train on"):
        hold_out(Mixture(selections((20,))), 20, 7)


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three data sets: a of 6 texts, b of 4, c of 9."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    sizes = {"a": 6, "b": 4, "c": 9}
    return {name: write_texts(tmp_path / f"{name}.jsonl", [f"{name}{n}" for n in range(size)]) for name, size in sizes.items()}


def loaded(entries: dict[str, Any], **options: Any) -> dict[str, list[str]]:
    """The texts of each set of a run."""
    sets = open_sets(entries, **options)
    try:
        return {name: in_order(units) for name, units in sets.by_name.items()}
    finally:
        sets.stop()


def test_sets_of_a_run(entries: dict[str, Any]) -> None:
    a, b, c = ([f"{name}{n}" for n in range(size)] for name, size in (("a", 6), ("b", 4), ("c", 9)))
    assert loaded(entries, dataset="b, a") == {"train": b + a}
    assert loaded(entries, dataset="b, a, b") == {"train": b + a}, "a data set named twice is used once"
    assert loaded(entries, dataset="a, b", mix_strategy="interleave_under") == {"train": ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]}
    assert loaded(entries, dataset="a, b", max_samples=2) == {"train": a[:2] + b[:2]}
    assert loaded(entries, dataset="a", eval_dataset="c, b") == {"train": a, "eval": c + b}
    assert loaded(entries, dataset="a, b", eval_dataset="b") == {"train": a + b, "eval": b}
    each = loaded(entries, dataset="b", eval_dataset="c, a", eval_on_each_dataset=True, max_samples=3)
    assert each == {"train": b[:3], "eval c": c[:3], "eval a": a[:3]}
    assert loaded(entries, dataset="", eval_dataset="c") == {"eval": c}


def test_interleaved_evaluation_sets_have_the_numbers_of_their_own(entries: dict[str, Any]) -> None:
    """The evaluation's data sets are not the first ones of the run."""
    found = loaded(entries, dataset="a", eval_dataset="c, b", mix_strategy="interleave_once")
    assert " ".join(found["eval"]) == "c0 b0 c1 b1 c2 b2 c3 b3 c4 c5 c6 c7 c8"


def test_held_out_samples_are_no_longer_trained_on(entries: dict[str, Any]) -> None:
    found = loaded(entries, dataset="a, c", val_size=0.3)
    everything = loaded(entries, dataset="a, c")["train"]
    assert len(found["eval"]) == 5
    assert sorted(found["train"] + found["eval"]) == sorted(everything)


def test_num_samples_of_an_entry(entries: dict[str, Any]) -> None:
    drawn = entries | {"c": entries["c"] | {"num_samples": 20}}
    first, again, other = (loaded(drawn, dataset="b, c", seed=seed)["train"][4:] for seed in (7, 7, 8))
    assert first == again != other
    assert Counter(Counter(first).values()) == {2: 7, 3: 2}
    assert loaded(drawn, dataset="b, c", max_samples=5)["train"][4:] == first[:5]
