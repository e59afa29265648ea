"""LoRA adapters beside one model, chosen row by row: the base's products are those of all rows together, each row adds its own update.

Shapes: R rows, T tokens, K numbers in, N out, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from finery.errors import UserError
from finery.models.peft_adapter import open_adapter


@dataclass(frozen=True)
class _Update:
    """s·B·A of one layer."""

    a_rK: Tensor
    b_Nr: Tensor
    scaling: float


class Adapters:
    """The updates of every adapter, and which rows of the next forward pass want which."""

    def __init__(self, model: nn.Module, folders: Mapping[str, Path]) -> None:
        """Raises `UserError` for an adapter that is more than plain LoRA: merge it, and serve what comes out."""
        self.names = tuple(folders)
        self.rows: Sequence[str | None] = ()
        updates: dict[str, dict[str, _Update]] = {}
        for name, folder in folders.items():
            for path, update in _updates(model, folder).items():
                updates.setdefault(path, {})[name] = update
        for path, of_adapter in updates.items():
            model.get_submodule(path).register_forward_hook(partial(self._add, of_adapter))

    def _add(self, updates: Mapping[str, _Update], module: nn.Module, inputs: tuple[Tensor], output_RTN: Tensor) -> Tensor:
        for name in {row for row in self.rows if row in updates}:
            rows = [number for number, row in enumerate(self.rows) if row == name]
            update = updates[name]  # type: ignore[index] -- a name, since it is in there
            x_RTK = inputs[0][rows].to(update.a_rK.dtype)
            down_RTr = nn.functional.linear(x_RTK, update.a_rK)
            output_RTN[rows] += (nn.functional.linear(down_RTr, update.b_Nr) * update.scaling).to(output_RTN.dtype)
        return output_RTN


def _updates(model: Any, folder: Path) -> dict[str, _Update]:
    """What an adapter adds to which layer, by the layer's path; the model is left as it was."""
    from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        if others := [key for key in file.keys() if not key.endswith((".lora_A.weight", ".lora_B.weight"))]:  # noqa: SIM118 -- no mapping
            raise _not_plain(folder, f"it holds more than pairs of two matrices, {others[0]} among others")
    opened = open_adapter(model, folder)
    try:
        found = {}
        for path, layer in opened.get_base_model().named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            if isinstance(layer, (Embedding, ParamWrapper)) or layer.lora_variant:
                raise _not_plain(folder, f"{path} has another kind of update than two matrices")
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()  # type: ignore[union-attr]
            found[path] = _Update(a.clone(), b.clone(), layer.scaling["default"])
    finally:
        opened.unload()
    return found


def _not_plain(folder: Path, why: str) -> UserError:
    return UserError(f"'served_adapters': {folder} cannot stay beside the model: {why}; merge it with 'finery export' and serve that")
