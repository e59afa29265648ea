"""Models of several parts: a language model, towers that see or hear, and the projector between them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from finery.errors import UserError
from finery.files import read_yaml
from finery.log import get_logger
from finery.options import OptionGroup

log = get_logger(__name__)

Part = Literal["language model", "vision tower", "projector"]
LANGUAGE: Part = "language model"
FREEZES: Mapping[str, Part] = {
    "freeze_vision_tower": "vision tower",
    "freeze_multi_modal_projector": "projector",
    "freeze_language_model": LANGUAGE,
}
"""Which key freezes which part."""


class CompositeOptions(OptionGroup):
    freeze_vision_tower: bool = True
    """Leave the towers of a model that sees or hears as they are."""
    freeze_multi_modal_projector: bool = True
    """Leave what stands between a tower and the language model as it is."""
    freeze_language_model: bool = False
    """Of a model that sees or hears, leave the language model as it is."""

    @property
    def frozen(self) -> frozenset[Part]:
        """The parts that are not trained."""
        values = self.model_dump()
        return frozenset(part for key, part in FREEZES.items() if values[key])


@dataclass(frozen=True)
class Parts:
    """Which part of a model each of its modules and weights belongs to, and which parts are trained."""

    roots: Sequence[str]  # where the language model lies; "" where it is all that has no other name
    present: frozenset[Part]
    frozen: frozenset[Part] = frozenset()

    @property
    def is_composite(self) -> bool:
        """Whether there is more than a language model."""
        return self.present != {LANGUAGE}

    def of(self, path: str) -> Part:
        """The part that the module or weight at `path` belongs to."""
        if not self.is_composite:
            return LANGUAGE
        return _part(path, self.roots)

    def is_open(self, path: str) -> bool:
        """Whether the part that it belongs to is trained."""
        return self.of(path) not in self.frozen

    def opened(self, paths: Iterable[str], key: str, name: str) -> list[str]:
        """Those of `paths`, which the user's `key` calls `name`, that are in a part that is trained; raises `UserError` where none is."""
        paths = list(paths)
        found = [path for path in paths if self.is_open(path)]
        if paths and not found:
            keys = ", ".join(f"'{switch}: false'" for switch, part in FREEZES.items() if part in {self.of(path) for path in paths})
            where = " and ".join(sorted({self.of(path) for path in paths}))
            raise UserError(f"{key!r}: {name!r} is in the {where} of this model, which is frozen: set {keys} to train it")
        return found


def parts_of(model: Any) -> Parts:
    """The parts of a model, with or without an adapter; nothing is frozen."""
    roots = _language_roots(model) if model.config.get_text_config() is not model.config else [""]
    names = [name for name, _ in model.named_parameters()]
    return Parts(roots, frozenset({LANGUAGE, *(_part(name, roots) for name in names)}))


def open_parts(model: Any, options: CompositeOptions) -> Parts:
    """The parts of a model, frozen as the keys say; raises `UserError` where that leaves nothing. Says so where they have no effect."""
    found = parts_of(model)
    if not found.is_composite:
        values = options.model_dump(include=set(FREEZES))
        if changed := [key for key in FREEZES if values[key] != CompositeOptions.model_fields[key].default]:
            keys = ", ".join(map(repr, changed))
            log.warning("%s: no effect, since %s is a language model alone", keys, type(model).__name__)
        return found
    if not found.present - options.frozen:
        keys = ", ".join(f"'{key}'" for key, part in FREEZES.items() if part in found.present)
        raise UserError(f"{keys}: all parts of this model are frozen, which leaves nothing to train; set one of them to false")
    trained = " and ".join(sorted(found.present - options.frozen))
    log.info("%s has a %s; trained: %s", type(model).__name__, ", a ".join(sorted(found.present)), trained)
    return Parts(found.roots, found.present, options.frozen)


def _language_roots(model: Any) -> list[str]:
    """Where the decoder, its embedding and its head lie."""
    places: dict[int, str] = {}
    for path, module in model.named_modules():
        places.setdefault(id(module), path)
    found = [places.get(id(layer)) for layer in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())]
    return [path for path in found if path is not None]


def _part(path: str, roots: Sequence[str]) -> Part:
    dotted = f".{path}."
    if any(f".{name}." in dotted for name in _names()["projectors"]):
        return "projector"
    if any(f".{name}." in dotted for name in _names()["towers"]):
        return "vision tower"
    return LANGUAGE if any(not root or dotted.startswith(f".{root}.") for root in roots) else "vision tower"


@cache
def _names() -> dict[str, Any]:
    return read_yaml(Path(__file__).with_suffix(".yaml"))


# ------------------------------------------------------------------ loading


def auto_class(folder: Path) -> Any:
    """The class of transformers that reads the model in `folder`: with all of its parts where it has more than a language model.

    Raises `UserError` for one that no causal language model comes of.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # told where the model is loaded
        return AutoModelForCausalLM
    kind, made_by = config.get("model_type"), config.get("architectures") or []
    if isinstance(brought := config.get("auto_map"), dict) and brought:
        return AutoModelForImageTextToText if _sees(brought) else AutoModelForCausalLM
    if kind in _names()["refused"]:
        raise UserError(f"{folder} holds a model of type {kind!r}, which cannot be trained here: {_names()['refused'][kind]}")
    whole, alone = _mapped(kind)
    if not whole or (alone and alone in made_by and alone != whole):
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def _sees(brought: Mapping[str, str]) -> bool:
    return "AutoModelForImageTextToText" in brought and "AutoModelForCausalLM" not in brought


def _mapped(kind: str | None) -> tuple[str | None, str | None]:
    """The names of the classes that hold all parts of a type of model, and its language model alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    whole: Mapping[str, str] = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES  # type: ignore[assignment]
    return whole.get(kind or ""), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind or "")
