"""Micro-batches side by side on a CPU, each by threads of its own.

Threads that share one product wait for each other after every operation, hundreds of times a second; threads with a micro-batch of
their own wait once a step. So two cores train close to twice as fast as one, on a busy machine too.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from finery.data.rows.base import Row
from finery.errors import UserError
from finery.models.adapters.base import first_layers, num_trained
from finery.models.head import bare
from finery.models.kernels.base import in_mode
from finery.training.memory import free_bytes
from finery.training.steps import Parts, cut, deal, tokens_of

Result = TypeVar("Result")

FEWEST_TOKENS = 128
"""A micro-batch of fewer costs as much: products of few rows are slow."""
ROOMY = 5 / 4
"""Parts of a lane may be so much larger than its share of the budget, where that saves a small one."""
SHARED_SPEED = 0.5
"""k threads on one micro-batch are as fast as k to this power (measured: 1.3 to 1.7 for two)."""


def share_out(rows: Sequence[Row], budget: int, most: int, threads: int, end_to_end: bool) -> list[Parts]:
    """What each lane works on, one part after the other; together they hold at most about `budget` tokens at a time.

    As many lanes as finish earliest, `most` at most: one long row alone is better shared by all threads.
    """
    best: list[Parts] = []
    shortest = float("inf")
    while most >= 1:
        lanes = _lanes(rows, budget, most, end_to_end)
        seconds = max((_cost(lane) for lane in lanes), default=0) / (threads / most) ** SHARED_SPEED
        if seconds < shortest:
            best, shortest = lanes, seconds
        most //= 2
    return best


def _lanes(rows: Sequence[Row], budget: int, number: int, end_to_end: bool) -> list[Parts]:
    """Rows end to end are dealt and then cut; padded parts stay together, the largest first, each to the lane that has least so far."""
    if number == 1:
        return [parts] if (parts := cut(rows, budget, end_to_end)) else []
    room = max(int(budget * ROOMY / number), 1)
    if end_to_end:
        return [cut(group, room, end_to_end) for group in deal(rows, number)]
    lanes: list[Parts] = [[] for _ in range(number)]
    for part in sorted(cut(rows, room), key=tokens_of, reverse=True):
        min(lanes, key=_cost).append(part)
    return [lane for lane in lanes if lane]


def _cost(parts: Parts) -> int:
    return sum(max(tokens_of(part), FEWEST_TOKENS) for part in parts)


class Lanes:
    """Threads that work side by side. Each sums the gradients of its own parts, and the sums are added in the order of the lanes: a run's
    bits do not depend on which thread was faster.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self.most = most
        self.threads = torch.get_num_threads()
        self._mine = threading.local()
        if most > 1:
            self._pool = ThreadPoolExecutor(most, "lane")
            self._trained = [p for p in model.parameters() if p.requires_grad]
            for place, parameter in enumerate(self._trained):
                parameter.register_hook(partial(self._keep, place))

    def run(self, lanes: Sequence[Parts], work: Callable[[list[Row], bool], Result]) -> list[Result]:
        """`work(part, is_in_first_lane)` for every part; the results lane by lane. `backward` inside adds to the gradients.

        Where one fails, the other lanes are let to their end, and the error of the first lane that failed is raised.
        """
        if len(lanes) < 2:
            return [work(part, True) for lane in lanes for part in lane]
        threads, graph = max(self.threads // len(lanes), 1), torch.is_grad_enabled()
        sums: list[dict[int, Tensor]] = [{} for _ in lanes]

        def walk(first: int) -> list[Result]:
            torch.set_num_threads(threads)  # of this thread alone
            self._mine.sums = sums[first]
            with torch.set_grad_enabled(graph):
                return [work(part, first == 0) for part in lanes[first]]

        futures = [self._pool.submit(walk, first) for first in range(len(lanes))]
        wait(futures)
        results = [result for future in futures for result in future.result()]
        self._gather(sums)
        return results

    def backward(self, total: Tensor) -> bool:
        """Adds the gradients of `total` to this lane's; false outside of a lane, where nothing was done.

        Raises `UserError` where nothing that is trained has a part in it.
        """
        if not total.requires_grad:
            told = "only a vision tower or a projector is trained, and texts alone do not go through them"
            raise UserError(f"this step would learn nothing: {told}; 'freeze_language_model: false' trains the language model")
        if getattr(self._mine, "sums", None) is None:
            return False
        torch.autograd.grad(total, self._trained, allow_unused=True)  # `_keep` takes them as they come
        return True

    def _keep(self, place: int, gradient: Tensor) -> Tensor | None:
        """A hook of each weight: takes a gradient as soon as it is there, and leaves zeros that take no memory."""
        sums: dict[int, Tensor] | None = getattr(self._mine, "sums", None)
        if sums is None:
            return None
        sums[place] = sums[place] + gradient if place in sums else gradient
        return gradient.new_zeros(()).expand_as(gradient)

    def _gather(self, sums: Sequence[dict[int, Tensor]]) -> None:
        with torch.no_grad():
            for place, parameter in enumerate(self._trained):
                for own in sums:
                    if (gradient := own.pop(place, None)) is not None:
                        parameter.grad = gradient.contiguous() if parameter.grad is None else parameter.grad.add_(gradient)


def most_lanes(model: nn.Module, threads: int) -> int:
    """One for each thread, if the gradients that each keeps for itself take a tenth of free memory at most."""
    each = 4 * num_trained(model)
    return int(max(min(threads, 1 + free_bytes(torch.device("cpu")) / 10 // max(each, 1)), 1))


def draws_dice(model: nn.Module) -> bool:
    """Whether a forward pass in training draws random numbers, as dropout does: lanes would share them out by chance."""
    before = torch.get_rng_state()
    with in_mode(model, training=True), torch.no_grad(), first_layers(bare(model)):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), targets=torch.zeros(1, 4, dtype=torch.long))
    drew = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return drew
