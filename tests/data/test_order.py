"""The order of samples: a permutation that is computed by place, and the same whatever works beside it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from finery.data.load import Sampling, Sets
from finery.data.order import ByLength, Order, Sequential, Shuffled, mix, permute
from finery.training.sampler import StepSampler
from letters import letter_rows, open_sets, slowly, spell, write_texts

SIZES = [*range(1, 40), 127, 128, 129, 1000, 4095, 4096, 4097, 65_537]


def lengths_of(size: int, seed: int = 0) -> Any:
    """Random lengths, many of them the same."""
    return np.random.default_rng(seed).integers(1, 50, size)


def orders(size: int, seed: int = 3) -> list[Order]:
    """One of each kind."""
    return [Sequential(size), Shuffled(size, seed), ByLength(lengths_of(size), seed, max(size // 30, 16))]


@pytest.mark.parametrize("size", SIZES)
def test_every_sample_comes_once_an_epoch(size: int) -> None:
    for order in orders(size):
        for epoch in (0, 1):
            dealt = order.at(epoch, 0, size)
            assert np.array_equal(np.sort(dealt), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 17, 100, 1000])
def test_a_part_is_that_of_the_whole(size: int) -> None:
    dice = np.random.default_rng(size)
    for order in orders(size):
        whole = order.at(2, 0, size)
        for _ in range(20):
            start, stop = sorted(dice.integers(0, size + 1, 2).tolist())
            assert np.array_equal(order.at(2, start, stop), whole[start:stop])
        assert np.array_equal(order.at(2, size - 1, size + 50), whole[-1:])  # beyond the end
        assert len(order.at(2, size, size + 50)) == 0


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    found = {tuple(Shuffled(200, seed).at(epoch, 0, 200).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(found) == 400
    by_length = [ByLength(lengths_of(200), seed, 16).at(epoch, 0, 200).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, by_length))) == 4
    assert np.array_equal(Shuffled(200, 5).at(3, 0, 200), Shuffled(200, 5).at(3, 0, 200))


def test_no_place_keeps_what_stands_there() -> None:
    """Fixed points are as rare as in a random permutation: one on the average."""
    fixed = sum(int((Shuffled(500, seed).at(0, 0, 500) == np.arange(500)).sum()) for seed in range(200))
    assert 130 < fixed < 270  # 200, with a deviation of 14


def chi_square(counts: Any) -> float:
    """How far counts that should all be the same are from that, in deviations of the statistic."""
    expected = counts.sum() / counts.size
    return float((((counts - expected) ** 2 / expected).sum() - counts.size + 1) / np.sqrt(2 * (counts.size - 1)))


@pytest.mark.parametrize("size", [4096, 5000, 40_000])
def test_a_shuffled_order_looks_random(size: int) -> None:
    """Where a sample stands says nothing of where it goes, nor does its neighbour, nor another epoch."""
    coarse = np.arange(size) * 16 // size
    for seed in range(3):
        first, second = Shuffled(size, seed).at(0, 0, size), Shuffled(size, seed).at(1, 0, size)
        other = Shuffled(size, seed + 1).at(0, 0, size)
        for one, two in [(coarse, first), (first[:-1], first[1:]), (first[:-2], first[2:]), (first, second), (first, other)]:
            grid = np.zeros((16, 16))
            np.add.at(grid, (one if one is coarse else one * 16 // size, two * 16 // size), 1)
            assert abs(chi_square(grid)) < 6
        last_bits = np.bincount(first[:-1] % 4 * 4 + first[1:] % 4, minlength=16)
        assert abs(chi_square(last_bits)) < 6


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 12])
def test_small_orders_are_all_alike_probable(size: int) -> None:
    """Every sample stands at every place equally often, and first two samples are every pair equally often."""
    num_seeds = 1500
    found = np.stack([permute(np.arange(size), size, mix(seed, 0)) for seed in range(num_seeds)])
    grid = np.stack([np.bincount(found[:, place], minlength=size) for place in range(size)])
    assert abs(grid / num_seeds - 1 / size).max() < 5 * np.sqrt(1 / size * (1 - 1 / size) / num_seeds)
    couples = Counter(map(tuple, found[:, :2].tolist()))
    assert len(couples) == size * (size - 1)
    share = 1 / (size * (size - 1))
    assert max(abs(count / num_seeds - share) for count in couples.values()) < 5 * np.sqrt(share / num_seeds)


def test_a_place_is_found_at_once_in_a_billion() -> None:
    found = Shuffled(1_000_000_000, 1).at(7, 999_999_000, 2_000_000_000)
    assert len(np.unique(found)) == 1000
    assert found.max() < 1_000_000_000


def test_rows_of_like_length_share_a_step() -> None:
    lengths = lengths_of(640)
    order = ByLength(lengths, 3, 64)
    dealt = lengths[order.at(0, 0, 640)].reshape(-1, 64)
    assert (np.diff(dealt, axis=1) <= 0).all()
    spread = np.ptp(lengths[order.at(0, 0, 640)].reshape(-1, 8), axis=1).mean()
    assert spread < np.ptp(lengths[Shuffled(640, 3).at(0, 0, 640)].reshape(-1, 8), axis=1).mean() / 3
    windows = {tuple(sorted(order.at(epoch, 0, 64).tolist())) for epoch in range(3)}
    assert len(windows) == 3, "each epoch has windows of other samples"


def test_numbers_mix() -> None:
    found = {mix(a, b) for a in range(-50, 50) for b in range(50)}
    assert len(found) == 5000
    assert all(0 <= number < 1 << 64 for number in found)
    assert mix(1, 2) != mix(2, 1) != mix(1, 2, 0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("skipped", [0, 1, 4])
def test_a_resumed_epoch_deals_the_rest(num_ranks: int, skipped: int) -> None:
    """What the sampler is told to skip is passed over in empty steps; the others are what they would have been."""
    order = Shuffled(50, 9)
    whole, rest = [], []
    for rank in range(num_ranks):
        sampler = StepSampler(order, 4, rank=rank, num_ranks=num_ranks)
        sampler.set_epoch(2)
        whole.append(list(sampler))
        sampler.skipped = skipped
        rest.append(list(sampler))
        assert list(sampler) == whole[-1], "an epoch after the resumed one is whole"
    assert all(one[:skipped] == [[]] * skipped and one[skipped:] == all_[skipped:] for one, all_ in zip(rest, whole, strict=True))
    steps = [sorted(unit for rank in step for unit in rank) for step in zip(*whole, strict=True)]
    assert sorted(unit for step in steps for unit in step) == list(range(50)), "ranks share the samples, none twice"


class Watcher:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, ...]] = []

    def begin(self, place: int) -> None:
        """Where the loop begins."""
        self.told.append((place,))

    def advance(self, place: int, num_ahead: int) -> None:
        """Where it is."""
        self.told.append((place, num_ahead))


def test_the_loop_tells_where_it_is_with_epochs_counted_through() -> None:
    watcher = Watcher()
    sampler = StepSampler(Sequential(10), 2, watcher=watcher, rank=1, num_ranks=2)
    sampler.set_epoch(3)
    sampler.skipped = 1
    assert list(sampler) == [[], [5, 7], [9]]
    assert watcher.told == [(34,), (34, 4), (38, 4)]


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Any]:
    """Two data sets of 150 and 90 texts."""
    sizes = {"a": 150, "b": 90}
    return {
        name: write_texts(tmp_path / f"{name}.jsonl", [f"{name}{n} " * (1 + n % 5) for n in range(size)]) for name, size in sizes.items()
    }


def dealt(sets: Sets, num_loader_workers: int, epoch: int = 0) -> Iterator[list[str]]:
    """The texts of each step, as the loop gets them."""
    assert sets.order is not None
    units: Any = sets.train
    sampler = StepSampler(sets.order, 8, watcher=units)
    sampler.set_epoch(epoch)
    for step in DataLoader(units, batch_sampler=sampler, collate_fn=list, num_workers=num_loader_workers):
        yield [text for unit in step for text in spell(unit)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
@pytest.mark.parametrize("options", [{}, {"mix_strategy": "interleave_over", "interleave_probs": "0.5, 0.5", "val_size": 0.1}])
def test_the_order_does_not_depend_on_workers(
    entries: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for encoders, loaders in ((1, 0), (3, 0), (2, 2)):
        monkeypatch.setenv("FINERY_CACHE", str(tmp_path / f"cache {encoders} {loaders}"))
        sets = open_sets(entries, letter_rows(seen=slowly(0.0002)), preprocessing_num_workers=encoders, **options)
        found.append([list(dealt(sets, loaders, epoch)) for epoch in (0, 1)])
        sets.stop()
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][1]
    first, second = ([text for step in epoch for text in step] for epoch in found[0])
    assert sorted(first) == sorted(second)


def test_another_seed_is_another_order(entries: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    found = []
    kinds: list[tuple[int, Sampling]] = [(1, "random"), (2, "random"), (1, "sequential"), (1, "group_by_length")]
    for seed, sampling in kinds:
        sets = open_sets(entries, seed=seed, sampling=sampling)
        found.append([text for step in dealt(sets, 0) for text in step])
        sets.stop()
    assert len(set(map(tuple, found))) == 4
    assert len({tuple(sorted(texts)) for texts in found}) == 1
    assert found[2][:3] == ["a0 ", "a1 a1 ", "a2 a2 a2 "]
