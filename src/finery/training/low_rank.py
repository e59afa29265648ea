"""What GaLore and APOLLO share: the weights whose gradients are projected to few dimensions, and how that is kept in a checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from finery.errors import UserError
from finery.options import Finding
from finery.training.optimizers.base import Optimizer, Setting, has_many_processes

if TYPE_CHECKING:
    import torch
    from torch import nn

KEPT = ("ortho_matrix", "seed", "svd_count")
"""What of a projector changes while it works; the rest stands in the group. torch would spoil texts when it loads a state."""


class LowRank(Optimizer):
    """An optimizer that steps linear layers by what a projection leaves of their gradients."""

    trains_adapters = False
    word: ClassVar[str]  # with which its keys begin
    takes: ClassVar[tuple[str, ...]]  # values of `optim` that it can build on

    @abstractmethod
    def kind(self, setting: Setting) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """The class of its package for what `optim` names, and the arguments of that."""

    @property
    @abstractmethod
    def projection(self) -> dict[str, Any]:
        """What marks a group as one that is projected."""

    @abstractmethod
    def projector(self, group: Mapping[str, Any]) -> Any:
        """A new projector for such a group."""

    @abstractmethod
    def refusal(self, shape: Sequence[int]) -> str:
        """Why a weight of this shape cannot be projected so; empty: it can."""

    def asked(self, name: str) -> Any:
        """The value of one of its keys, without their common beginning."""
        return self.options.model_dump()[f"{self.word}_{name}"]

    @property
    def steps_in_hooks(self) -> bool:
        """Each weight by itself, where that is asked for."""
        return self.asked("layerwise")

    @property
    def in_turn(self) -> str:
        """Threads of their own would not call the hooks."""
        return "weights are stepped while gradients come" if self.steps_in_hooks else ""

    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """Linear layers as `<word>_target` names them are projected, the other weights are stepped as usual."""
        from finery.training.joined import InHooks

        kind, arguments = self.kind(setting)
        kind = self._keeping(kind)
        targets = self._targets(model)
        groups: dict[tuple[bool, bool], dict[str, Any]] = {}
        single: list[dict[str, Any]] = []
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                kinds = (name in targets, name in setting.decayed)
                group = {"weight_decay": setting.weight_decay if kinds[1] else 0.0, **(self.projection if kinds[0] else {})}
                groups.setdefault(kinds, {"params": [], **group})["params"].append(weight)
                single.append({"params": [weight], **group})
        if not self.steps_in_hooks:
            return kind(list(groups.values()), **arguments)
        order = [weight for group in groups.values() for weight in group["params"]]
        places = {weight: place for place, weight in enumerate(order, start=1)}
        parts = [kind([group], **arguments) for group in single]
        for part in parts:
            for weight, state in part.state.items():
                if "seed" in state:  # by its place among all weights, as in one optimizer for all
                    state["seed"] = places[weight]
        return InHooks(parts, lambda: self.ends_step)

    def _targets(self, model: nn.Module) -> set[str]:
        from finery.models.adapters.base import module_names

        known, wanted = module_names(model), self.asked("target")
        layers = {name for names in known.values() for name in names if "all" in wanted or any(word in name for word in wanted)}
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        found = {f"{name}.weight" for name in layers} & weights.keys()
        if not found:
            raise UserError(f"'{self.word}_target' names no linear layer that is trained; this model has: {', '.join(sorted(known))}")
        for name in sorted(found):
            if why := self.refusal(weights[name].shape):
                raise UserError(f"{why}; {name} has {' x '.join(map(str, weights[name].shape))} weights")
        return found

    def _keeping(self, kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
        """The class with a state that can be saved: a projector as a mapping of what changes in it."""
        part = self

        class Keeping(kind):
            def state_dict(self) -> dict[str, Any]:
                found = super().state_dict()
                return found | {"state": {place: _flat(state) for place, state in found["state"].items()}}

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                super().load_state_dict(state_dict)
                for group in self.param_groups:
                    for weight in group["params"]:
                        kept = self.state[weight].get("projector") if weight in self.state else None
                        if kept is not None:
                            self.state[weight]["projector"] = _restored(part.projector(group), kept)

        return Keeping

    def check_more(self, run: Any) -> Iterator[Finding]:
        """What it builds on, and what stepping weights one by one rules out."""
        if (optim := run.trainer.get("optim", self.takes[0])) not in self.takes:
            yield Finding(self.switch, f"needs 'optim' to be one of {', '.join(self.takes)}, found {optim!r}")
        if not run.model.pure_bf16:
            yield Finding(self.switch, "saves most memory with 'pure_bf16: true'", fatal=False)
        if self.steps_in_hooks:
            yield from self._check_hooks(run)

    def _check_hooks(self, run: Any) -> Iterator[Finding]:
        key = f"{self.word}_layerwise"
        if (steps := run.loop.gradient_accumulation_steps) != 1:
            yield Finding(key, f"needs 'gradient_accumulation_steps: 1', found {steps}")
        if run.loop.fp16:
            yield Finding(key, "steps weights before 'fp16' can scale gradients back: use 'bf16' or 'pure_bf16'")
        if has_many_processes():
            yield Finding(key, "works in one process: gradients of several are summed up only after it has stepped")


def _flat(state: Mapping[str, Any]) -> Mapping[str, Any]:
    if "projector" not in state:
        return state
    kept = {name: value for name, value in vars(state["projector"]).items() if name in KEPT}
    # their layout decides over the last bits of products, and a file does not hold it
    strides = [list(matrix.stride()) for matrix in _matrices(state["projector"])]
    return {**state, "projector": {**kept, "strides": strides}}


def _restored(projector: Any, kept: dict[str, Any]) -> Any:
    strides = kept.pop("strides")
    vars(projector).update(kept)
    laid = [
        matrix.new_empty_strided(matrix.shape, tuple(stride)).copy_(matrix)
        for matrix, stride in zip(_matrices(projector), strides, strict=True)
    ]
    projector.ortho_matrix = laid if isinstance(projector.ortho_matrix, list) else laid[0]
    return projector


def _matrices(projector: Any) -> list[torch.Tensor]:
    """One, or a left and a right one."""
    return projector.ortho_matrix if isinstance(projector.ortho_matrix, list) else [projector.ortho_matrix]
