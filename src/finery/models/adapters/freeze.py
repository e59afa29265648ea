"""Freeze tuning: some layers are trained in full, the others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finery.errors import UserError, suggestion
from finery.models.adapters.base import Adapter, layer_stack
from finery.models.peft_adapter import expanded_layers
from finery.options import CommaList, OptionGroup

__all__ = ["Freeze"]


class Freeze(Adapter):
    """Trains the last or the first layers, whole or some modules of them, and modules outside the layers."""

    class Options(OptionGroup):
        freeze_trainable_modules: CommaList = ("all",)
        """Which modules of those layers are trained, by name; all of them by default."""
        freeze_extra_modules: CommaList = ()
        """Modules outside the layers to train as well, by name."""

    options: Options
    shares = frozenset({"freeze_trainable_layers", "use_llama_pro"})

    def apply(self, model: Any, folders: Sequence[Path] = (), new_tokens: range = range(0)) -> Any:
        """Freeze all, then open what the keys name. Raises `UserError` for layers or modules that are not there."""
        model.requires_grad_(False)
        prefix, layers = layer_stack(model)
        wanted = self._wanted(model, len(layers))
        inner = {part for name, _ in layers[0].named_parameters() for part in name.split(".")[:-1]}
        outer = {part for name, _ in model.named_parameters() if not name.startswith(prefix) for part in name.split(".")[:-1]}
        _all_known("freeze_trainable_modules", self.options.freeze_trainable_modules, inner | {"all"})
        _all_known("freeze_extra_modules", self.options.freeze_extra_modules, outer)
        for name, parameter in model.named_parameters():
            if name.startswith(prefix):
                number, *parts = name.removeprefix(prefix).split(".")
                chosen = int(number) in wanted and bool({"all", *parts} & set(self.options.freeze_trainable_modules))
            else:
                chosen = bool(set(name.split(".")) & set(self.options.freeze_extra_modules))
            parameter.requires_grad_(chosen)
        return model

    def _wanted(self, model: Any, num_layers: int) -> set[int]:
        number = self.shared.freeze_trainable_layers
        if self.shared.use_llama_pro:
            return set(expanded_layers(model, number))
        if not number or abs(number) > num_layers:
            raise UserError(
                f"'freeze_trainable_layers' is {number}, but the model has {num_layers} layers; give 1 to {num_layers}, or negative"
            )
        return set(range(num_layers - number, num_layers) if number > 0 else range(-number))


def _all_known(key: str, names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            hint = suggestion(name, known) or f"; there are: {', '.join(sorted(known))}"
            raise UserError(f"{key!r}: the model has no module {name!r}{hint}")
