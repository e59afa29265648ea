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
    def config(self, model: Any, new_tokens: range) -> Any:
        """peft's config of a fresh adapter."""

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
        config = self.config(merged, new_tokens)
        try:
            return saves_lean(get_peft_model(merged, config))
        except (ValueError, TypeError, NotImplementedError, AssertionError, AttributeError, RuntimeError, ImportError) as error:
            raise UserError(f"this adapter does not fit this model and these settings: {' '.join(str(error).split())[:300]}") from None

    def merge(self, model: Any, folders: Sequence[Path]) -> Any:
        """Merge adapters one after the other, in the order given; raises `UserError` for one that does not fit or cannot be merged."""
        for folder in folders:
            opened = open_adapter(model, folder)
            try:
                model = opened.merge_and_unload()
            except (NotImplementedError, AttributeError, ValueError, TypeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"the adapter in {folder} is of a kind that cannot be merged into weights: {reason}") from None
        return model

    def put_on(self, model: Any, folders: Sequence[Path]) -> Any:
        """A single adapter, beside weights of few bits; raises `UserError` for more."""
        if len(folders) > 1:
            raise UserError("several adapters cannot be put on weights of few bits: merge them first, with finery export")
        return open_adapter(model, folders[0]) if folders else model

    def additional(self, model: Any) -> list[str]:
        """`additional_target`; raises `UserError` for a module that is not there."""
        known = {name for name, _ in named(model)} - {""}
        for name in self.shared.additional_target:
            if name.rpartition(".")[2] not in known:
                raise UserError(f"'additional_target': the model has no module {name!r}{suggestion(name, known)}")
        return list(self.shared.additional_target)


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's own config; empty where it cannot be read, which is told where it is opened."""
    try:
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def targets(model: Any, key: str, asked: Sequence[str]) -> list[str]:
    """The linear layers that `asked` means: names or ends of paths, `all` but the head, or one regular expression for whole paths.

    Raises `UserError` for what no layer is called.
    """
    known = module_names(model)
    if "all" in asked:
        return sorted(known)
    paths = sorted(path for found in known.values() for path in found)
    if len(asked) == 1 and REGEX.search(asked[0]):
        try:
            matching = [path for path in paths if re.fullmatch(asked[0], path)]
        except re.error as error:
            raise UserError(f"{key!r}: {asked[0]!r} is no regular expression: {error}") from None
        if not matching:
            raise UserError(f"{key!r}: no linear layer's path is matched by {asked[0]!r}; paths are such as {paths[0]}")
        return matching
    for name in asked:
        if name not in known and not any(path == name or path.endswith(f".{name}") for path in paths):
            hint = suggestion(name, known) or f"; there are: {', '.join(sorted(known))}"
            raise UserError(f"{key!r}: the model has no linear layer {name!r}{hint}")
    return list(asked)


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


def open_adapter(model: Any, folder: Path, is_trainable: bool = False) -> Any:
    """The model with the adapter in `folder` beside its weights."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise UserError(f"the adapter in {folder} does not fit this model: {reason}") from None


def saves_lean(model: Any) -> Any:
    """Where embeddings have grown, peft would save them whole, new and old rows, beside the new rows that the adapter holds."""
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model
