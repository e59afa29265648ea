"""Which samples a step holds: a pure function of seed, epoch and rank."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Deals samples to steps and ranks; none is repeated, the last step may be smaller.

    A step holds `batch_size` samples of every rank together; rank r takes each `num_ranks`-th from the r-th on.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, num_ranks: int = 1, drop_last: bool = False
    ) -> None:
        self.num_samples = num_samples
        self.step_size = batch_size * num_ranks
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.step_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.num_samples))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        for step in range(len(self)):
            share = order[step * self.step_size : (step + 1) * self.step_size]
            yield share[self.rank :: self.num_ranks]
