"""What a kernel is: a faster way to compute what a model computes anyway, put in place of it on one instance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Patches:
    """Methods replaced on instances, so that a trial which fails can put the model's own back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let `module` compute with `forward`; its class and all other instances stay as they are."""
        before = module.__dict__.get("forward")
        module.forward = forward

        def back() -> None:
            del module.__dict__["forward"]
            if before is not None:
                module.forward = before

        self.also(back)

    def forwards(self, found: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> int:
        """`forward` for each; returns how many. All are found first, since what is replaced looks otherwise."""
        pairs = list(found)
        for module, forward in pairs:
            self.forward(module, forward)
        return len(pairs)

    def also(self, back: Callable[[], None]) -> None:
        """Remember how to take something else back."""
        self._undo.append(back)

    def undo(self) -> None:
        """Put everything back, the last first."""
        while self._undo:
            self._undo.pop()()


class Kernel(ABC):
    """One faster way, which one key switches off (or on)."""

    Options: ClassVar[type[OptionGroup]]
    switch: ClassVar[str]  # the key

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def is_on(self) -> bool:
        """Whether the user's keys let it serve."""
        return self.options.model_dump()[self.switch]

    @abstractmethod
    def fits(self, model: Any) -> str:
        """Nothing where the kernel can serve on this model and machine, else what keeps it from it."""

    @abstractmethod
    def apply(self, model: Any, patches: Patches) -> int:
        """Put it in place wherever it computes what is there; returns in how many places."""

    def check(self, run: Any) -> Iterator[Finding]:
        """What does not fit together with other keys."""
        yield from ()


def is_close(ours: Tensor, plain: Tensor) -> bool:
    """Whether two results are the same but for rounding in their number format."""
    import torch

    half = torch.finfo(plain.dtype).bits == 16
    return bool(torch.allclose(ours.float(), plain.float(), rtol=3e-2 if half else 1e-4, atol=(3e-2 if half else 1e-4) * _scale(plain)))


def _scale(tensor: Tensor) -> float:
    return float(tensor.float().abs().max()) or 1.0


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or evaluation; afterwards as it was."""
    if all(module.training == training for module in model.modules()):  # setting a mode takes a hundred times as long as looking
        yield
        return
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def compute_dtype(x: Tensor, weight: Any) -> torch.dtype:
    """What products are computed in: autocast's format where it is on, else the weight's."""
    import torch

    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def untouched(module: nn.Module) -> bool:
    """Whether nobody has replaced this instance's forward."""
    return "forward" not in module.__dict__


def cpu_only(model: Any) -> str:
    """What keeps a kernel in C from serving."""
    from finery.models.kernels import native

    return "" if native.serves(next(model.parameters())) else "it is built for CPUs, and needs a C compiler"
