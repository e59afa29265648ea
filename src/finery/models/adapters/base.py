"""What an adapter is: it makes a model trainable, and merges what was trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finery.errors import UserError
from finery.models.composite import LANGUAGE, CompositeOptions, parts_of
from finery.models.quantized import HELD
from finery.options import CommaList, Finding, OptionGroup

if TYPE_CHECKING:
    import torch
    from torch import nn


_MOST_FIRST = 8
"""Layers that are enough to try things with, whatever kinds there are."""


class AdapterOptions(CompositeOptions):
    additional_target: CommaList = ()
    """Modules that are trained in full and saved with an adapter, such as embed_tokens."""
    create_new_adapter: bool = False
    """Merge all given adapters and start a fresh one, instead of going on with the last."""
    freeze_trainable_layers: int = 2
    """How many layers freeze trains: the last n, or the first n where the number is negative. With use_llama_pro: how many were added."""
    use_llama_pro: bool = False
    """Train only the layers that `finery expand` has added (LLaMA-Pro): whole with freeze, by adapters with lora."""


class Adapter(ABC):
    """A way to train a model. The flags say what a run may expect of it."""

    takes_adapters = False  # adapter_name_or_path makes sense
    frozen_base = False  # the base's weights are not trained: they may be held in half precision, or in few bits
    has_two_matrices = False  # what it trains are pairs of A and B
    starts_anew = False  # given adapters are merged into the base, and a fresh one is trained
    model_file = "model.safetensors"  # what a finished output folder holds
    config_file = "config.json"

    shares: ClassVar[frozenset[str]] = frozenset()  # the keys of `AdapterOptions` that it reads, beside those of composite models

    Options: ClassVar[type[OptionGroup]] = OptionGroup  # no keys, unless a subclass has some

    def __init__(self, options: Any, shared: AdapterOptions | None = None) -> None:
        self.options = options
        self.shared = shared or AdapterOptions()

    @abstractmethod
    def apply(self, model: Any, folders: Sequence[Path] = (), new_tokens: range = range(0)) -> Any:
        """Make `model` trainable, starting from the adapters in `folders`; `new_tokens` are ids that it never saw."""

    def merge(self, model: Any, folders: Sequence[Path]) -> Any:
        """The model with what was trained in it, as a plain model."""
        return model

    def put_on(self, model: Any, folders: Sequence[Path]) -> Any:
        """The model with what was trained beside its weights, which are held in few bits and cannot take it in."""
        return self.merge(model, folders)

    def decided(self) -> Mapping[str, tuple[Any, str]]:
        """Keys whose value follows from others: the value and why."""
        return {}

    def continued(self, folders: Sequence[Path]) -> Mapping[str, tuple[Any, str]]:
        """Keys whose value the adapters in `folders` settle: the value and why."""
        return {}

    def begin(self, model: Any, num_steps: int) -> None:
        """Called before the first step of a run of so many."""
        return

    def after_step(self, model: Any, step: int) -> None:
        """Called when weights were stepped for the `step`-th time (from 1 on), while their gradients are still there."""
        return

    def check(self, run: Any) -> Iterator[Finding]:
        """What does not fit together with other keys; a shared key that this part does not read asks for what will not be."""
        for key in AdapterOptions.model_fields.keys() - CompositeOptions.model_fields.keys() - self.shares:
            if getattr(self.shared, key) != AdapterOptions.model_fields[key].default:
                text = f"is not read with this 'finetuning_type', found {run.choices.finetuning_type!r}"
                yield Finding(key, text, fatal=key == "use_llama_pro")


def set_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights that are trained in `dtype`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def num_trained(model: nn.Module) -> int:
    """How many weights are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def module_names(model: Any) -> dict[str, list[str]]:
    """Linear layers by their last name, without the output head: `{"q_proj": ["model.layers.0.self_attn.q_proj", …]}`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if (isinstance(module, (nn.Linear, Conv1D)) or HELD in module.__dict__) and module is not head and name:
            found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def layer_stack(model: Any) -> tuple[str, Any]:
    """The language model's longest list of modules, which is its stack of layers, and its name with a dot; raises `UserError` for none."""
    from torch import nn

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    parts = parts_of(model)
    stacks = [(f"{name}.", module) for name, module in lists if parts.of(name) == LANGUAGE]
    if not stacks:
        raise UserError("the model has no stack of layers: 'finetuning_type: lora' or 'full' may serve")
    return max(stacks, key=lambda stack: len(stack[1]))


@contextmanager
def first_layers(base: Any) -> Iterator[nn.ModuleList]:
    """The model with no more than its first layers: two, or as many as it takes to have each kind."""
    from torch import nn

    name, layers = layer_stack(base)
    kinds = base.config.get_text_config().to_dict().get("layer_types") or []
    number = next((n for n in range(2, _MOST_FIRST) if set(kinds[:n]) == set(kinds)), _MOST_FIRST)
    parent, _, own = name.removesuffix(".").rpartition(".")
    holder = base.get_submodule(parent)
    few = nn.ModuleList(list(layers)[:number])
    setattr(holder, own, few)
    try:
        yield few
    finally:
        setattr(holder, own, layers)
