"""Which samples a step holds: a pure function of the order, the epoch and the rank; and what loads them."""

import ctypes
import signal
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, Sampler

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


class StepLoader(DataLoader):
    """A loader whose items are whole optimizer steps (of this rank)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, worker_init_fn=_end_with_the_run, **kwargs)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler; Hugging Face's loop calls this."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when the one that has started it is gone."""


def _end_with_the_run(_: int) -> None:
    """Called in a process that loads data: where the run is killed, it ends at once.

    torch has it look every five seconds, after an event whose lock dies with a run that was killed while it held it: then it waits for
    ever, keeps the token store locked, and the next run encodes anew. Other systems than Linux are left with that.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
