"""What LOMO and AdaLomo share: `optim` names them, and they step each weight in the backward pass, as soon as its gradient is whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from finery.options import Finding, OptionGroup
from finery.training.optimizers.base import Optimizer, Setting, has_many_processes

if TYPE_CHECKING:
    import torch
    from torch import nn


class InBackward(Optimizer):
    """An optimizer that never holds the gradients of all weights, where a step is one micro-batch.

    Of several micro-batches the gradients are summed, and the last backward pass steps: the step of a run does not depend on
    how it is cut. The package lomo-optim would step in each of them.
    """

    switch = "optim"
    stand_in = "sgd"  # transformers would ask for the package
    in_turn = "weights are stepped while gradients come"
    word: ClassVar[str]  # of `optim`

    class Options(OptionGroup):
        pass

    @abstractmethod
    def rule(self) -> type[torch.optim.Optimizer]:
        """What steps a weight."""

    @property
    def steps_in_hooks(self) -> bool:
        """Always."""
        return True

    def serves(self, run: Any) -> bool:
        """Where `optim` says so."""
        return run.trainer.get("optim") == self.word

    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """A rule for each weight."""
        from finery.training.joined import InHooks

        rule, parts = self.rule(), []
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                decay = setting.weight_decay if name in setting.decayed else 0.0
                parts.append(rule([weight], lr=setting.arguments["lr"], weight_decay=decay))  # type: ignore[call-arg]
        return InHooks(parts, lambda: self.ends_step)

    def check_more(self, run: Any) -> Iterator[Finding]:
        """What stepping weights one by one rules out."""
        found = f"is {self.word!r}, which"
        if run.loop.fp16:
            yield Finding("optim", f"{found} steps weights before 'fp16' can scale gradients back: use 'bf16' or 'pure_bf16'")
        if has_many_processes():
            yield Finding("optim", f"{found} works in one process: gradients of several are summed up only after it has stepped")
        if run.trainer.get("optim_args"):
            yield Finding("optim_args", f"has no effect with 'optim: {self.word}'", fatal=False)
        if not run.model.pure_bf16 and not run.adapter.takes_adapters:
            yield Finding("optim", f"{found} saves most memory with 'pure_bf16: true'", fatal=False)
