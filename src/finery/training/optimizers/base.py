"""What an optimizer part is: a key switches it on, and it steps the weights that are trained."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from finery.compat import have, install_of, num_ranks
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    import torch
    from torch import nn

ADAMW = ("adamw_torch", "adamw_torch_fused")
"""What `optim` calls torch's AdamW."""


@dataclass(frozen=True)
class Setting:
    """What the loop's own keys ask for: the optimizer that `optim` names, and its arguments."""

    name: str  # of `optim`
    kind: type[torch.optim.Optimizer]
    arguments: Mapping[str, Any]  # lr, betas, eps, …
    weight_decay: float
    decayed: frozenset[str]  # names of the weights that decay: no norms, no biases

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The trained weights that decay, and those that do not."""
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        return [
            {"params": [weight for name, weight in trained if name in self.decayed], "weight_decay": self.weight_decay},
            {"params": [weight for name, weight in trained if name not in self.decayed], "weight_decay": 0.0},
        ]


class Optimizer(ABC):
    """One way to step weights. The flags say what a run may expect of it."""

    Options: ClassVar[type[OptionGroup]]
    switch: ClassVar[str]  # the key
    package: ClassVar[str] = ""  # which it needs
    trains_adapters = True  # makes sense for the small weights of adapters, too
    stand_in: ClassVar[str] = ""  # what transformers is told that `optim` is, where it has other ways to step it
    keeps_formats = False  # steps half-precision weights as they are: no fp32 copies are made
    in_turn = ""  # why micro-batches must be worked on one after the other; empty: they may be side by side

    def __init__(self, options: Any) -> None:
        self.options = options
        self.ends_step = False  # set by the loop: the gradients that come now are the last of a step

    @property
    def steps_in_hooks(self) -> bool:
        """Whether weights are stepped while gradients come: no later look at all gradients can change the step."""
        return False

    @property
    def is_on(self) -> bool:
        """Whether the user's keys ask for it."""
        return bool(self.options.model_dump()[self.switch])

    def serves(self, run: Any) -> bool:
        """Whether `run` asks for it: by its key, or else by what `optim` says."""
        return self.is_on

    @abstractmethod
    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """The optimizer of the trained weights of `model`."""

    def join(self, accelerator: Any) -> None:  # noqa: B027
        """Change how the loop treats gradients, where this optimizer needs it."""

    def check(self, run: Any) -> Iterator[Finding]:
        """Its package, one at a time, and no adapters where it is made for whole weights."""
        if not self.serves(run):
            return
        if self.package and not have(self.package):
            yield Finding(self.switch, f"needs a package: {install_of(self.package)}")
        others = [part.switch for part in run.switched_on if part.switch != self.switch]
        if others and self.switch < min(others):
            yield Finding(self.switch, f"and {', '.join(map(repr, others))} are optimizers: keep one")
        if not self.trains_adapters and run.adapter.takes_adapters:
            yield Finding(
                self.switch, f"is made for whole weights: set 'finetuning_type' to full or freeze, found {run.choices.finetuning_type!r}"
            )
        if self.in_turn and (run.loop.micro_batches_at_once or 1) > 1:
            yield Finding(self.switch, f"needs 'micro_batches_at_once: 1': {self.in_turn}, found {run.loop.micro_batches_at_once}")
        yield from self.check_more(run)

    def check_more(self, run: Any) -> Iterator[Finding]:
        """What else does not fit together with other keys, where it is on."""
        yield from ()


def has_many_processes() -> bool:
    """Whether gradients come from several processes, or will when they are started."""
    from finery.training.arguments import visible_devices

    return num_ranks() > 1 or ("LOCAL_RANK" not in os.environ and visible_devices() > 1)
