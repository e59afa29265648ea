"""Half-quadratic quantisation (Badri and Shaji, 2023): 1 to 8 bits without any data, on GPUs and CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.errors import UserError
from finery.models.adapters.base import module_names
from finery.models.quantizers.base import Quantizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["HQQ"]

GROUP = 64
"""Weights of a row that share a scale and a zero."""
HELD_IN = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3.2, 2: 2, 1: 1}
"""Bits that a number takes as hqq packs it: ten of 3 bits in 32, and 5 or 6 in 8."""


class HQQ(Quantizer):
    """Through the package hqq itself: transformers 5.23 has no way to it."""

    bits = (1, 2, 3, 4, 5, 6, 8)
    checkpoints = ("hqq",)
    package = "hqq"
    loads_packed = False

    def read(self, folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
        """A model as transformers 4 saved it: what hqq's layers hold lies under their names in the safetensors files."""
        from hqq.core.quantize import HQQLinear
        from safetensors.torch import load_file
        from torch import nn
        from transformers import AutoModelForCausalLM

        weights = {name: weight for path in sorted(folder.glob("*.safetensors")) for name, weight in load_file(path).items()}
        paths = sorted(name.removesuffix(".W_q") for name in weights if name.endswith(".W_q"))
        if not paths:
            raise UserError(f"{folder} says that it comes quantised by hqq, but holds no layers of hqq in safetensors files")
        config.__dict__.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for path in paths:
            packed = HQQLinear(None, None, compute_dtype=dtype, device=str(device), initialize=False)  # type: ignore[arg-type]
            part = {name.removeprefix(f"{path}."): weights.pop(name) for name in list(weights) if name.startswith(f"{path}.")}
            packed.load_state_dict(part | {"W_q": nn.Parameter(part["W_q"], requires_grad=False)})
            packed.meta["compute_dtype"] = packed.compute_dtype = dtype  # type: ignore[index]
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, packed)
        found = model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, strict=False)
        model.tie_weights()
        lacking = [name for name in found.missing_keys if not any(name.startswith(f"{path}.") for path in paths)]
        if [name for name in lacking if name not in (model._tied_weights_keys or ())]:
            raise UserError(f"{folder} holds no weights for {lacking[0]}")
        return model.to(device).eval()

    def finish(self, model: Any, bits: int | None, dtype: torch.dtype, device: torch.device) -> Any:
        """Layer after layer is packed and its plain weights let go."""
        from hqq.core.quantize import HQQLinear, hqq_base_quant_config

        if bits is None:
            return model  # it came so
        names = [path for paths in module_names(model).values() for path in paths]
        for path in names:
            layer = model.get_submodule(path)
            width = next((size for size in (GROUP, 32, 16, 8) if layer.in_features % size == 0), None)
            if width is None or type(layer).__name__ != "Linear":
                continue  # hqq has no group for it
            config = hqq_base_quant_config(nbits=bits, group_size=width, axis=1)
            packed = HQQLinear(layer, config, compute_dtype=dtype, device=str(device), del_orig=True)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, packed)
        return model.to(device)

    def holds(self, layer: nn.Module) -> bool:
        """hqq's own layers."""
        from hqq.core.quantize import HQQLinear

        return isinstance(layer, HQQLinear)

    def plain_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """Widened, in `dtype`."""
        return layer.dequantize().to(dtype)

    def tensors(self, layer: Any) -> Iterator[Tensor]:
        """Packed numbers, scales and zeros."""
        yield layer.W_q.data
        yield from (layer.meta["scale"], layer.meta["zero"])

    def bits_each(self, bits: int, dtype: torch.dtype) -> float:
        """A scale and a zero for 64 weights, in the format of products."""
        return HELD_IN[bits] + 2 * 8 * dtype.itemsize / GROUP
