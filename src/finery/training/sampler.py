"""Which samples a step holds: a pure function of the order, the epoch and the rank."""

from collections.abc import Iterator
from typing import Protocol

from torch.utils.data import Sampler

from finery.data.order import Order


class Watcher(Protocol):
    """What is told where the loop is, so that samples are ready when their step comes."""

    def begin(self, place: int) -> None:
        """The loop begins at a place, epochs counted through."""
        ...

    def advance(self, place: int, num_ahead: int) -> None:
        """The loop takes `num_ahead` samples from a place on."""
        ...


class StepSampler(Sampler[list[int]]):
    """Deals units to steps and ranks; none is repeated, the last step may be smaller.

    A step holds `batch_size` units of every rank together; rank r takes each `num_ranks`-th from the r-th on.
    """

    def __init__(
        self, order: Order, batch_size: int, *, watcher: Watcher | None = None, rank: int = 0, num_ranks: int = 1, drop_last: bool = False
    ) -> None:
        self.order = order
        self.step_size = batch_size * num_ranks
        self.watcher = watcher
        self.rank = rank
        self.num_ranks = num_ranks
        self.drop_last = drop_last
        self.epoch = 0
        self.skipped = 0  # steps of the next epoch that were done before; whoever sets it passes over as many empty ones

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.order.size, self.step_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        skipped, self.skipped = self.skipped, 0
        yield from ([] for _ in range(skipped))
        passed = self.epoch * self.order.size
        if self.watcher is not None:
            self.watcher.begin(passed + skipped * self.step_size)
        for step in range(skipped, len(self)):
            start = step * self.step_size
            if self.watcher is not None:
                self.watcher.advance(passed + start, self.step_size)
            yield self.order.at(self.epoch, start, start + self.step_size)[self.rank :: self.num_ranks].tolist()
