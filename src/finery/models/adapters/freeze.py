"""Freeze tuning: some layers are trained in full, the others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finery.errors import UserError, suggestion
from finery.models.adapters.base import Adapter, layer_stack
from finery.models.composite import LANGUAGE, Parts, open_parts
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
        """Freeze all, then open what the keys name, and whole parts beside the language model that are not frozen.

        Raises `UserError` for layers or modules that are not there.
        """
        parts = open_parts(model, self.shared)
        model.requires_grad_(False)
        prefix, layers = layer_stack(model)
        wanted = self._wanted(model, len(layers)) if LANGUAGE not in parts.frozen else set()
        names = [name for name, _ in model.named_parameters()]
        inner = {part for layer in layers for name, _ in layer.named_parameters() for part in name.split(".")[:-1]}
        _all_known("freeze_trainable_modules", self.options.freeze_trainable_modules, inner | {"all"})
        self._check_outer(parts, [name for name in names if not name.startswith(prefix)])
        for name, parameter in model.named_parameters():
            if name.startswith(prefix):
                number, *inside = name.removeprefix(prefix).split(".")
                chosen = int(number) in wanted and bool({"all", *inside} & set(self.options.freeze_trainable_modules))
            else:
                named = bool(set(name.split(".")) & set(self.options.freeze_extra_modules))
                chosen = parts.is_open(name) and (named or parts.of(name) != LANGUAGE)
            parameter.requires_grad_(chosen)
        return model

    def _check_outer(self, parts: Parts, names: Sequence[str]) -> None:
        """`freeze_extra_modules` are there, in parts that are trained."""
        key = "freeze_extra_modules"
        _all_known(key, self.options.freeze_extra_modules, {part for name in names for part in name.split(".")[:-1]})
        for module in self.options.freeze_extra_modules:
            parts.opened((name for name in names if module in name.split(".")), key, module)

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
