"""What a quantizer is: it holds the weights of linear layers in few bits while a model is loaded, or reads a model that comes so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from finery.compat import have, install_of
from finery.errors import UserError
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class QuantizationOptions(OptionGroup):
    quantization_bit: int | None = Field(None, gt=0)
    """Hold the frozen weights in so many bits (QLoRA); not given: as they are."""
    quantization_device_map: Literal["auto"] | None = None
    """In chat, spread the model over all devices there are."""

    def check(self, run: Any) -> Iterator[Finding]:
        """Bits that the method makes, its package, and an adapter that trains beside frozen weights."""
        bits, quantizer, method = self.quantization_bit, run.quantizer, run.choices.quantization_method
        if bits is None:
            return
        if bits not in quantizer.bits:
            makes = ", ".join(map(str, quantizer.bits)) or "none: it reads models that come quantised, without 'quantization_bit'"
            yield Finding("quantization_bit", f"should be what 'quantization_method: {method}' makes ({makes}), found {bits}")
        elif quantizer.package and not have(quantizer.package):
            yield Finding("quantization_method", f"is {method!r}, which needs a package: {install_of(quantizer.package)}")
        if len(run.model.adapter_name_or_path) > 1 or (run.model.adapter_name_or_path and run.adapter.starts_anew):
            text = "leaves no weights that an adapter could be merged into: merge it first (finery export), or give a single adapter"
            yield Finding("quantization_bit", text)
        yield from quantizer.check(run)

    def check_training(self, run: Any) -> Iterator[Finding]:
        """What a run that trains needs besides: one device, and an adapter beside frozen weights."""
        if self.quantization_device_map:
            yield Finding("quantization_device_map", "is for chat alone: training holds a model on one device; leave it out")
        if self.quantization_bit and not run.adapter.frozen_base:
            found = f"found {run.choices.finetuning_type!r}"
            yield Finding("quantization_bit", f"needs a 'finetuning_type' that leaves weights as they are, {found}")


class Quantizer:
    """Holds linear layers in few bits. The flags say what a run may expect of it."""

    bits: ClassVar[Sequence[int]] = ()  # what it makes of plain weights while they are loaded
    checkpoints: ClassVar[Sequence[str]] = ()  # what models that come quantised call it (`quant_method` in their config.json)
    package: ClassVar[str] = ""  # which it needs
    serves_others: ClassVar[bool] = False  # other parts of a run may use the package as well
    loads_packed = True  # transformers packs the weights as it reads them; otherwise `finish` does
    widens: ClassVar[bool] = False  # a model that comes quantised becomes a plain one while it is loaded

    Options: ClassVar[type[OptionGroup]] = OptionGroup  # no keys, unless a subclass has some

    def __init__(self, options: Any) -> None:
        self.options = options

    def arguments(self, bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """What transformers' `from_pretrained` is told to hold plain weights in `bits`; products are computed in `dtype`."""
        return {}

    def opening(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """What `from_pretrained` is told of a model that comes quantised; `config` is the quantization_config in its config.json."""
        return {}

    def read(self, folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
        """The model in `folder`, which comes quantised, where transformers has no way to it; nothing where it has."""
        return None

    def finish(self, model: Any, bits: int | None, dtype: torch.dtype, device: torch.device) -> Any:
        """The loaded model, with what is left to be done; `bits` is None where it came quantised."""
        return model

    def holds(self, layer: nn.Module) -> bool:
        """Whether this layer's weights are held by this quantizer."""
        return False

    def is_exact(self, layer: nn.Module) -> bool:
        """Whether a layer that it holds computes x·Wᵀ with the very weights that `plain_weight` gives."""
        return True

    def plain_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The weights (outputs, inputs) of a layer that it holds; raises `UserError` where they cannot be had."""
        raise UserError(f"weights that {type(self).__name__} holds cannot be widened: start from the model in 16 bits")

    def shows_lengths(self, bits: int) -> bool:
        """Whether peft can read the weights of such layers, whose rows' lengths DoRA trains."""
        return True

    def tensors(self, layer: Any) -> Iterator[Tensor]:
        """Everything that the weights of a layer are held in: packed numbers, scales, zeros."""
        yield from flat_tensors(layer.weight)

    def bits_each(self, bits: int, dtype: torch.dtype) -> float:
        """How many bits a weight should take with its share of scales."""
        return float(bits)

    def check(self, run: Any) -> Iterator[Finding]:
        """What does not fit together with other keys."""
        yield from ()


@dataclass(frozen=True)
class Quantizing:
    """What a run asks for: by which quantizer its weights are held, in how many bits, on which devices."""

    quantizer: Quantizer
    bits: int
    device_map: str | None = None


def flat_tensors(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of, where it is one of many parts (torch's subclasses of Tensor)."""
    if callable(getattr(type(tensor), "__tensor_flatten__", None)):
        for name in tensor.__tensor_flatten__()[0]:
            yield from flat_tensors(getattr(tensor, name))
    else:
        yield tensor
