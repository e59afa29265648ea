"""Where the time of steps goes, how fast tokens are trained, and what bounds it."""

import time
from functools import cache
from typing import Any

import torch

from finery.models.composite import LANGUAGE, parts_of
from finery.models.quantized import HELD
from finery.training.memory import is_out_of_memory

PHASES = ("data", "forward", "backward", "optimizer")


class Clock:
    """Seconds of each phase, and the work that was done in them. On a GPU, where calls return at once, phases end by events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.done: dict[str, float] = dict.fromkeys((*PHASES, "tokens", "supervised", "flops"), 0.0)
        self._told = dict(self.done)  # up to the newest lap
        self._last: Any = None
        self._open: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        """From here on, time counts for the phase that is marked next."""
        self._last = self._now()

    def mark(self, phase: str) -> None:
        """A phase ends."""
        now = self._now()
        if self._last is not None:
            self._open.append((phase, self._last, now))
        self._last = now
        if self.device.type != "cuda":
            self._settle()

    def count(self, tokens: int, supervised: int, flops: float) -> None:
        """What a step has done."""
        for name, more in (("tokens", tokens), ("supervised", supervised), ("flops", flops)):
            self.done[name] += more

    def lap(self) -> dict[str, float]:
        """See `report`, for what was done since the last lap."""
        self._settle()
        since = {name: value - self._told[name] for name, value in self.done.items()}
        self._told = dict(self.done)
        return _rates(since)

    def report(self) -> dict[str, float]:
        """Speeds, and the share of each phase, of all that was done; empty where nothing was."""
        self._settle()
        return _rates(self.done)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        if self._open and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for phase, begin, end in self._open:
            self.done[phase] += end - begin if self.device.type != "cuda" else begin.elapsed_time(end) / 1000
        self._open.clear()


def _rates(done: dict[str, float]) -> dict[str, float]:
    whole = sum(done[phase] for phase in PHASES)
    if not whole or not done["tokens"]:
        return {}
    return {
        "tokens_per_second": round(done["tokens"] / whole, 1),
        "supervised_tokens_per_second": round(done["supervised"] / whole, 1),
        "tflops": round(done["flops"] / whole / 1e12, 4),
        **{f"{phase}_share": round(done[phase] / whole, 4) for phase in PHASES},
    }


def flops_each(model: Any) -> tuple[float, float]:
    """Floating-point operations of a step for each token, and for each supervised one more.

    2 for each weight of a product forward, 2 to its inputs, 2 more where it is trained. Embeddings are looked up and count nothing, the
    head counts for supervised tokens; attention and recomputation are left out, as in the usual figure (Kaplan et al., 2020, arXiv
    2001.08361).
    """
    head = model.get_output_embeddings()
    each = {False: 0.0, True: 0.0}
    parts = parts_of(model)
    for path, module in model.named_modules():
        if parts.of(path) != LANGUAGE:  # no text goes through towers and projectors
            continue
        if HELD in module.__dict__:
            each[False] += module.in_features * module.out_features * 4
        elif isinstance(module, torch.nn.Linear):
            each[module is head] += module.weight.numel() * (6 if module.weight.requires_grad else 4)
    return each[False], each[True]


def product_peak(dtype: torch.dtype, device: torch.device) -> float:
    """The fastest of some products of 2048 × 2048 matrices (8192 on a GPU), in FLOP/s: what a training step could reach at most.

    Measured once in a process for as many threads.
    """
    return _product_peak(dtype, device, 8192 if device.type == "cuda" else 2048, torch.get_num_threads())


@cache
def _product_peak(dtype: torch.dtype, device: torch.device, size: int, threads: int) -> float:
    """The matrices are smaller where memory is short, so that looking at a run does not end it."""
    dice = torch.Generator(device).manual_seed(0)  # the run's own must not depend on when this is measured
    try:
        left, right, _ = (torch.randn(size, size, dtype=dtype, device=device, generator=dice) for _ in range(3))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or size < 64:
            raise
        return _product_peak(dtype, device, size // 2, threads)
    best = float("inf")
    for _ in range(8 if device.type == "cuda" else 4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def bound(report: dict[str, float], share_of_peak: float) -> str:
    """What bounds a run, in words."""
    if report["data_share"] > 0.2:
        return "the data: samples come more slowly than they are learnt"
    if report["optimizer_share"] > 0.3:
        return "the optimizer's step: larger steps would spread it"
    if share_of_peak > 0.5:
        return "the model's matrix products"
    return "memory traffic and small operations between the products"
