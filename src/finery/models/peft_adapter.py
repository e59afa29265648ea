"""Adapters in peft's formats: what all of them share, from a fresh one to the merge."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finery.errors import UserError, suggestion
from finery.log import get_logger
from finery.models.adapters.base import Adapter, layer_stack, module_names
from finery.models.composite import Parts, open_parts
from finery.options import Finding

log = get_logger(__name__)

REGEX = re.compile(r"[\\^$*+?()\[\]|]")
"""Signs that a name of a module never has."""


class PeftAdapter(Adapter):
    """Small weights beside (or in) frozen ones, saved in peft's format."""

    takes_adapters = True
    frozen_base = True
    model_file = "adapter_model.safetensors"
    config_file = "adapter_config.json"
    shares = frozenset({"additional_target", "create_new_adapter"})
    shown: Mapping[str, str] = {}  # its keys that an adapter's own config tells, and what they are called there

    @property
    def starts_anew(self) -> bool:
        """`create_new_adapter`."""
        return self.shared.create_new_adapter

    def goes_on(self, folders: Sequence[Any]) -> bool:
        """Whether the last adapter of `folders` is trained on, and no fresh one."""
        return bool(folders) and not self.starts_anew

    @abstractmethod
    def config(self, model: Any, parts: Parts, new_tokens: range) -> Any:
        """peft's config of a fresh adapter, in the `parts` of the model that are trained."""

    def check(self, run: Any) -> Iterator[Finding]:
        """A fresh adapter is only created beside others."""
        yield from super().check(run)
        if self.shared.create_new_adapter and not run.model.adapter_name_or_path:
            yield Finding("create_new_adapter", "has no effect without 'adapter_name_or_path'", fatal=False)

    def continued(self, folders: Sequence[Path]) -> Mapping[str, tuple[Any, str]]:
        """What the config of the adapter that is gone on with says of this part's keys."""
        if not self.goes_on(folders):
            return {}
        own = read_config(folders[-1])
        return {key: (own[name], f"as in {folders[-1]}, which is gone on with") for key, name in self.shown.items() if name in own}

    def apply(self, model: Any, folders: Sequence[Path] = (), new_tokens: range = range(0)) -> Any:
        """Go on with the last adapter of `folders` (the others are merged), or add a fresh one; raises `UserError` where none fits."""
        from peft import get_peft_model

        goes_on = self.goes_on(folders)
        merged = self.merge(model, folders[:-1] if goes_on else folders)
        if goes_on:
            log.info("going on with the adapter in %s: its own rank, alpha and targets count", folders[-1])
            return saves_lean(open_adapter(merged, folders[-1], is_trainable=True))
        config = self.config(merged, open_parts(merged, self.shared), new_tokens)
        try:
            return saves_lean(get_peft_model(merged, config))
        except (ValueError, TypeError, NotImplementedError, AssertionError, AttributeError, RuntimeError, ImportError) as error:
            raise UserError(f"this adapter does not fit this model and these settings: {' '.join(str(error).split())[:300]}") from None

    def merge(self, model: Any, folders: Sequence[Path]) -> Any:
        """Merge adapters one after the other, in the order given; raises `UserError` for one that does not fit or cannot be merged."""
        for folder in folders:
            opened = open_adapter(model, folder)
            _part_tied(opened.get_base_model())
            try:
                model = opened.merge_and_unload()
            except (NotImplementedError, AttributeError, ValueError, TypeError) as error:
                raise not_mergeable(folder, error) from None
        return model

    def put_on(self, model: Any, folders: Sequence[Path]) -> Any:
        """A single adapter, beside weights of few bits; raises `UserError` for more."""
        if len(folders) > 1:
            raise UserError("several adapters cannot be put on weights of few bits: merge them first, with finery export")
        return open_adapter(model, folders[0]) if folders else model

    def additional(self, model: Any, parts: Parts) -> list[str]:
        """`additional_target`, of composite models by whole paths; raises `UserError` for a module that is not there, or frozen."""
        known = {path for path, _ in model.named_modules() if path}
        asked: list[str] = []
        for name in self.shared.additional_target:
            if not (found := [path for path in known if is_called(path, name)]):
                hint = suggestion(name, {path.rpartition(".")[2] for path in known})
                raise UserError(f"'additional_target': the model has no module {name!r}{hint}")
            found = parts.opened(found, "additional_target", name)
            asked += sorted(found) if parts.is_composite else [name]
        return asked


def is_called(path: str, name: str) -> bool:
    """Whether `name` is a path, or the end of one."""
    return path == name or path.endswith(f".{name}")


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's own config; empty where it cannot be read, which is told where it is opened."""
    try:
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def targets(model: Any, key: str, asked: Sequence[str], parts: Parts, layers: Sequence[int] | None = None) -> list[str]:
    """The linear layers that `asked` means: names or ends of paths, `all` but the head, or one regular expression for whole paths.

    Of composite models only those in `parts` that are trained, and of a model's `layers` only those that are numbered here; both are told
    by whole paths. Raises `UserError` for what no layer is called.
    """
    known = module_names(model)
    paths = sorted(path for found in known.values() for path in found)
    if "all" in asked:
        found, names = _all_open(key, paths, parts), sorted(known)
    elif len(asked) == 1 and REGEX.search(asked[0]):
        found = names = parts.opened(_matching(key, asked[0], paths), key, asked[0])
    else:
        found, names = _called(key, asked, known, parts), list(asked)
    if layers is not None:
        stack, _ = layer_stack(model)
        return [path for path in found if path.startswith(tuple(f"{stack}{number}." for number in layers))]
    return found if parts.is_composite else names


def _all_open(key: str, paths: Sequence[str], parts: Parts) -> list[str]:
    found = [path for path in paths if parts.is_open(path)]
    bare = " and the ".join(sorted(parts.present - parts.frozen - {parts.of(path) for path in found}))
    if not found:
        raise UserError(f"{key!r}: the {bare} of this model has no linear layers; 'additional_target' may name its modules")
    if bare:
        log.warning("%r: the %s of this model has no linear layers; 'additional_target' may name its modules", key, bare)
    return found


def _matching(key: str, regex: str, paths: Sequence[str]) -> list[str]:
    try:
        matching = [path for path in paths if re.fullmatch(regex, path)]
    except re.error as error:
        raise UserError(f"{key!r}: {regex!r} is no regular expression: {error}") from None
    if not matching:
        raise UserError(f"{key!r}: no linear layer's path is matched by {regex!r}; paths are such as {paths[0]}")
    return matching


def _called(key: str, asked: Sequence[str], known: Mapping[str, Sequence[str]], parts: Parts) -> list[str]:
    paths = [path for found in known.values() for path in found]
    called = {name: [path for path in paths if is_called(path, name)] for name in asked}
    for name, found in called.items():
        if not found:
            hint = suggestion(name, known) or f"; there are: {', '.join(sorted(known))}"
            raise UserError(f"{key!r}: the model has no linear layer {name!r}{hint}")
    return sorted({path for name, found in called.items() for path in parts.opened(found, key, name)})


def any_transposed(model: Any, targets: Sequence[str]) -> bool:
    """Whether a target holds its weights the other way round, as GPT-2's layers do."""
    from transformers.pytorch_utils import Conv1D

    return any(
        isinstance(module, Conv1D) for path, module in model.named_modules() if path.rpartition(".")[2] in targets or path in targets
    )


def expanded_layers(model: Any, number: int) -> list[int]:
    """Which layers LLaMA-Pro's expansion has put in (Wu et al., 2024, arXiv 2401.02415): the last of every group; raises `UserError`."""
    _, layers = layer_stack(model)
    if number < 1 or len(layers) % number:
        text = f"'freeze_trainable_layers' is {number}, but 'use_llama_pro' takes it as the number of added layers, which must divide"
        raise UserError(f"{text} all {len(layers)}")
    each = len(layers) // number
    return list(range(each - 1, len(layers), each))


def named(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules by their last names."""
    return ((path.rpartition(".")[2], module) for path, module in model.named_modules())


def _part_tied(model: Any) -> None:
    """Where embedding and head are one weight, and an update was trained beside one of them, the other must not get it by a merge."""
    from torch import nn

    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    plain = [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers]
    if len(plain) == 2 and any("base_layer" in layer._modules for layer in layers) and plain[0].weight is plain[1].weight:
        plain[1].weight = nn.Parameter(plain[0].weight.detach().clone(), requires_grad=False)


def not_mergeable(folder: Path, error: object) -> UserError:
    """What to tell of an adapter that peft cannot merge."""
    return UserError(f"the adapter in {folder} is of a kind that cannot be merged into weights: {' '.join(str(error).split())[:200]}")


def open_adapter(model: Any, folder: Path, is_trainable: bool = False, is_light: bool = False) -> Any:
    """The model with the adapter in `folder` beside its weights; `is_light`: beside a model that has none, nothing is drawn first."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, low_cpu_mem_usage=is_light)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise UserError(f"the adapter in {folder} does not fit this model: {reason}") from None


def saves_lean(model: Any) -> Any:
    """Where embeddings have grown, peft would save them whole, new and old rows, beside the new rows that the adapter holds."""
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model
