"""Where the first NaN or infinity of a step comes from, and what is needed to see it again elsewhere.

The first number that is not finite is what counts: all later ones are its children. Hooks look at what goes into and comes out of every
module, in the order in which it is computed, forward and then backward. What a kernel computes without calling a module is told of the
module around it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finery.data.rows.base import Row
from finery.training.dice import undisturbed_dice

ROWS, WEIGHTS, REPORT = "rows.safetensors", "weights.safetensors", "report.json"


@dataclass(frozen=True)
class NonFinite:
    """The first module that made a number which is not finite, out of numbers that all were."""

    where: Literal["weight", "input", "output", "loss", "gradient"]
    module: str  # its name in the model
    kind: str  # its class
    count: int  # how many numbers of the tensor are not finite
    size: int  # of so many
    largest_input: float  # the largest magnitude that went in: of `weight` among its finite numbers, of `gradient` of the one that came
    weights: tuple[str, ...] = ()  # of `weight` all that are not finite, of `gradient` the one whose gradient is not

    def __str__(self) -> str:
        module = f"{self.module or 'the model'} ({self.kind})"
        first, more = self.weights[0] if self.weights else "", len(self.weights) - 1
        what = {
            "weight": f"the weight {first} {f'and {more} others are' if more > 0 else 'is'} not finite before the step",
            "input": f"what goes into {module} is not finite",
            "output": f"{module} gives what is not finite",
            "loss": f"the loss that {module} gives is not finite",
            "gradient": f"the backward pass of {module} gives what is not finite{f' for {first}' if first else ''}",
        }[self.where]
        return f"{what}: {self.count:,} of {self.size:,} numbers; the largest that went in was {self.largest_input:.4g}"


def find_non_finite(model: nn.Module, work: Callable[[], Tensor]) -> NonFinite | None:
    """The origin of the first number that is not finite, or nothing where all are.

    `work` runs the forward pass of one micro-batch and gives the tensor that the backward pass starts from; that pass is made here, and
    no gradient of a weight is touched. Hooks are taken off again, and the dice are left as they were found, whatever goes wrong.
    """
    broken = [(name, weight) for name, weight in model.named_parameters() if _magnitude(weight) == math.inf]
    if broken:
        name, weight = broken[0]
        module = model.get_submodule(name.rpartition(".")[0])
        good = weight.detach()[torch.isfinite(weight.detach())]
        largest = float(good.abs().max()) if good.numel() else 0.0
        place, names = name.rpartition(".")[0], tuple(name for name, _ in broken)
        return NonFinite("weight", place, type(module).__name__, *_counts(weight), largest, names)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    search = _Search(model)
    with undisturbed_dice(), search.hooks():
        start = work()
        if search.found is None and start.requires_grad:
            search.watch_loss(start)
            try:
                torch.autograd.grad(start, trained, allow_unused=True)
            except RuntimeError as error:
                if "heckpoint" not in str(error):  # re-entrant recomputation has no part in it: what was seen until there is told
                    raise
    return search.found


def _magnitude(value: Tensor) -> float:
    """The largest magnitude in a tensor, infinite where a number is not finite; 0 for what holds no such numbers."""
    value = value.detach()
    if not (value.is_floating_point() and value.numel()) or type(value) not in (Tensor, nn.Parameter):
        return 0.0  # packed bits of quantizers are no numbers
    low, high = (value.float() if value.itemsize == 1 else value).aminmax()
    largest = max(-float(low), float(high))
    return largest if math.isfinite(largest) else math.inf


def _counts(value: Tensor) -> tuple[int, int]:
    return int((~torch.isfinite(value.detach())).sum()), value.numel()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in arguments or results. Masks are left out: what they hide is minus infinity in some models."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if "mask" not in str(name):
                yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@dataclass
class _Call:
    """A module that is at work, or was."""

    name: str
    module: nn.Module
    caller: _Call | None
    largest_input: float = 0.0
    largest_gradient: float = 0.0  # of those that came
    views: dict[int, tuple[Tensor, Tensor, list[_Call]]] = field(default_factory=dict)  # what it hands on, and to which calls


@dataclass
class _Search:
    """Looks at what passes between modules, and keeps the first that is not finite."""

    model: nn.Module
    found: NonFinite | None = None
    forward: bool = True
    inputs: dict[str, float] = field(default_factory=dict)  # the largest magnitude that went into each module
    open: list[_Call] = field(default_factory=list)  # calls that have not ended, the outermost first
    given: dict[int, tuple[Tensor, list[_Call]]] = field(default_factory=dict)  # results of the newest call that ended, and whose they are

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While they are on, modules and weights report."""
        handles: list[Any] = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
                for own, weight in module.named_parameters(recurse=False):
                    if weight.requires_grad:
                        handles.append(weight.register_hook(partial(self._weight, name, own, module)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- forward

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """What goes in; what is not finite here was made by the module that calls, between the modules that it calls."""
        if not self.forward:
            return None  # recomputed
        call = _Call(name, module, self.open[-1] if self.open else None)
        self.open.append(call)
        self.given.clear()
        for value in _tensors((args, kwargs)):
            call.largest_input = max(call.largest_input, _magnitude(value))
            if call.largest_input == math.inf and self.found is None:
                self.found = self._made_by(call.caller, value) if call.caller else self._told("input", call, value, math.inf)
        self.inputs[name] = max(self.inputs.get(name, 0.0), call.largest_input)
        return self._own_views(call, args), self._own_views(call, kwargs)

    def _own_views(self, call: _Call, value: Any) -> Any:
        """The same tensors, each seen through a view: its gradient is then what this call gives back, without what others do.

        Siblings that are called with the same tensor are given the same view: kernels know by that that they may be computed together.
        """
        if isinstance(value, Tensor):
            if not value.requires_grad or value.is_leaf or not torch.is_grad_enabled():
                return value
            views = call.caller.views if call.caller else {}
            if id(value) in views:
                views[id(value)][2].append(call)
                return views[id(value)][1]
            calls = [call]
            view = value.view_as(value)
            view.register_hook(partial(self._gradient_given, calls))
            views[id(value)] = (value, view, calls)
            return view
        if type(value) in (tuple, list):
            return type(value)(self._own_views(call, item) for item in value)
        return {name: self._own_views(call, item) for name, item in value.items()} if type(value) is dict else value

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """What comes out; of the calls that give the very same tensor the outermost is the one that others see."""
        if not self.forward:
            return
        call, before, self.given = self.open.pop(), self.given, {}
        call.views.clear()
        for value in _tensors(output):
            if self.found is None and _magnitude(value) == math.inf:
                self.found = self._made_by(call, value)
            if value.requires_grad and not value.is_leaf:
                if id(value) in before:
                    self.given[id(value)] = before[id(value)]
                    before[id(value)][1].append(call)
                else:
                    self.given[id(value)] = (value, calls := [call])
                    value.register_hook(partial(self._gradient_came, calls))

    def _made_by(self, call: _Call, value: Tensor) -> NonFinite:
        return self._told("output" if value.ndim else "loss", call, value, call.largest_input)

    @staticmethod
    def _told(where: Any, call: _Call, value: Tensor, largest: float) -> NonFinite:
        return NonFinite(where, call.name, type(call.module).__name__, *_counts(value), largest)

    # -- backward

    def watch_loss(self, start: Tensor) -> None:
        """The forward pass is over, and was finite, unless what was made of the model's own loss is not."""
        self.forward = False
        self.given.clear()
        if _magnitude(start) == math.inf:
            self.found = NonFinite("loss", "", type(self.model).__name__, *_counts(start), 0.0)

    def _gradient_came(self, calls: list[_Call], gradient: Tensor) -> None:
        """Of what calls gave: where it is not finite, the module is at fault that works with it, around the outermost of them."""
        largest = _magnitude(gradient)
        for call in calls:
            call.largest_gradient = max(call.largest_gradient, largest)
        if largest == math.inf and self.found is None:
            outer = calls[-1].caller or _Call("", self.model, None)
            self.found = self._told("gradient", outer, gradient, outer.largest_gradient)

    def _gradient_given(self, calls: list[_Call], gradient: Tensor) -> None:
        """Of what went into a call; where several had a part in it, the module is named that called them."""
        if self.found is None and _magnitude(gradient) == math.inf:
            call = calls[0] if len(calls) == 1 or calls[0].caller is None else calls[0].caller
            self.found = self._told("gradient", call, gradient, max(one.largest_gradient for one in (call, *calls)))

    def _weight(self, name: str, own: str, module: nn.Module, gradient: Tensor) -> None:
        """Of a trained weight."""
        if self.found is None and _magnitude(gradient) == math.inf:
            full = f"{name}.{own}".removeprefix(".")
            self.found = NonFinite("gradient", name, type(module).__name__, *_counts(gradient), self.inputs.get(name, 0.0), (full,))


@dataclass(frozen=True)
class Repro:
    """What a step that went wrong was made of."""

    rows: list[Row]
    weights: dict[str, Tensor]  # trained ones, as they were before the step: `model.load_state_dict(weights, strict=False)`
    report: dict[str, Any]


def save_repro(
    folder: Path, rows: Sequence[Row], model: nn.Module, *, step: int, loss: float, told: Sequence[str], found: NonFinite | None
) -> Path:
    """Write `folder`/step-N: rows, a report and the trained weights, with which a freshly loaded model does the same again.

    `told` says where each row comes from.
    """
    folder = folder / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "ids": [row.ids for row in rows],
        "labels": [row.labels for row in rows],
        "positions": [row.positions if row.positions is not None else np.arange(len(row.ids), dtype=np.int32) for row in rows],
        "origin": [np.asarray(row.origin, np.int64) for row in rows],
    }
    tensors = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in arrays.items()}
    tensors["lengths"] = torch.tensor([len(row.ids) for row in rows])
    tensors["origin_lengths"] = torch.tensor([len(row.origin) for row in rows])
    tensors["own_positions"] = torch.tensor([row.positions is not None for row in rows])
    save_file(tensors, folder / ROWS)
    trained = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters() if weight.requires_grad}
    save_file(trained, folder / WEIGHTS)
    report = {"step": step, "loss": _number(loss), "rows": list(told), "weights": WEIGHTS}
    report["found"] = {name: _number(value) for name, value in asdict(found).items()} if found is not None else None
    report["text"] = str(found) if found is not None else "everything is finite when the step is done again"
    (folder / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def _number(value: Any) -> Any:
    """JSON has no infinities."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def load_repro(folder: Path) -> Repro:
    """Read what `save_repro` wrote in a folder step-N."""
    tensors = {name: tensor.numpy() for name, tensor in load_file(folder / ROWS).items()}
    ends, origins = np.cumsum(tensors["lengths"])[:-1], np.cumsum(tensors["origin_lengths"])[:-1]
    parts = (np.split(tensors[name], ends) for name in ("ids", "labels", "positions"))
    rows = [
        Row(ids, labels, positions if own else None, tuple(origin.tolist()))
        for ids, labels, positions, origin, own in zip(*parts, np.split(tensors["origin"], origins), tensors["own_positions"], strict=True)
    ]
    return Repro(rows, load_file(folder / WEIGHTS), json.loads((folder / REPORT).read_text(encoding="utf-8")))
