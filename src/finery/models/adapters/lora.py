"""LoRA: low-rank updates beside frozen weights."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from finery.errors import UserError, suggestion
from finery.log import get_logger
from finery.models.adapters.base import Adapter, module_names
from finery.options import CommaList, Finding, OptionGroup

__all__ = ["LoRA"]

log = get_logger(__name__)


class LoRA(Adapter):
    """Adapters in peft's format (Hu et al., 2021, arXiv 2106.09685): W + alpha / rank · B·A."""

    takes_adapters = True
    frozen_base = True
    has_two_matrices = True
    model_file = "adapter_model.safetensors"
    config_file = "adapter_config.json"

    class Options(OptionGroup):
        lora_rank: int = Field(8, gt=0)
        """Rank of the update."""
        lora_alpha: int | None = Field(None, ge=0)
        """Scale of the update; twice the rank where it is not given, or 0."""
        lora_dropout: float = Field(0.0, ge=0, lt=1)
        """Dropout before the update."""
        lora_target: CommaList = Field(("all",), min_length=1)
        """Which linear layers get an adapter, by name; all of them but the head by default."""
        additional_target: CommaList = ()
        """Modules that are trained in full and saved with the adapter, such as embed_tokens."""
        create_new_adapter: bool = False
        """Merge all given adapters and start a fresh one, instead of going on with the last."""

    options: Options

    @property
    def starts_anew(self) -> bool:
        """`create_new_adapter`."""
        return self.options.create_new_adapter

    @property
    def alpha(self) -> int:
        """`lora_alpha`, or twice the rank."""
        return self.options.lora_alpha or 2 * self.options.lora_rank

    def decided(self) -> Mapping[str, tuple[Any, str]]:
        """Alpha follows from the rank."""
        return {} if self.options.lora_alpha else {"lora_alpha": (self.alpha, "twice lora_rank")}

    def check(self, run: Any) -> Iterator[Finding]:
        """A fresh adapter is only created beside others."""
        if self.options.create_new_adapter and not run.model.adapter_name_or_path:
            yield Finding("create_new_adapter", "has no effect without 'adapter_name_or_path'", fatal=False)

    def apply(self, model: Any, folders: Sequence[Path] = (), new_tokens: range = range(0)) -> Any:
        """Go on with the last adapter of `folders` (the others are merged), or add a fresh one."""
        from peft import LoraConfig, get_peft_model

        goes_on = bool(folders) and not self.options.create_new_adapter
        merged = self.merge(model, folders[:-1] if goes_on else folders)
        if goes_on:
            log.info("going on with the adapter in %s: its own rank, alpha and targets count", folders[-1])
            return _saves_lean(_open(merged, folders[-1], is_trainable=True))
        config = LoraConfig(
            r=self.options.lora_rank,
            lora_alpha=self.alpha,
            lora_dropout=self.options.lora_dropout,
            target_modules=(targets := self._targets(merged)),
            fan_in_fan_out=_any_transposed(merged, targets),
            modules_to_save=self._additional(merged) or None,
            trainable_token_indices=self._new_rows(merged, new_tokens),
            ensure_weight_tying=self._trains_tied(merged),
            task_type="CAUSAL_LM",
        )
        return _saves_lean(get_peft_model(merged, config))

    def put_on(self, model: Any, folders: Sequence[Path]) -> Any:
        """A single adapter, beside weights of few bits; raises `UserError` for more."""
        if len(folders) > 1:
            raise UserError("several adapters cannot be put on weights of few bits: merge them first, with finery export")
        return _open(model, folders[0]) if folders else model

    def merge(self, model: Any, folders: Sequence[Path]) -> Any:
        """Merge adapters one after the other, in the order given; raises `UserError` for one that does not fit."""
        for folder in folders:
            model = _open(model, folder).merge_and_unload()
        return model

    def _targets(self, model: Any) -> list[str]:
        known = module_names(model)
        if "all" in self.options.lora_target:
            return sorted(known)
        paths = {path for paths in known.values() for path in paths}
        for name in self.options.lora_target:
            if name not in known and not any(path == name or path.endswith(f".{name}") for path in paths):
                hint = suggestion(name, known) or f"; there are: {', '.join(sorted(known))}"
                raise UserError(f"'lora_target': the model has no linear layer {name!r}{hint}")
        return list(self.options.lora_target)

    def _additional(self, model: Any) -> list[str]:
        known = {name for name, _ in _named(model)} - {""}
        for name in self.options.additional_target:
            if name.rpartition(".")[2] not in known:
                raise UserError(f"'additional_target': the model has no module {name!r}{suggestion(name, known)}")
        return list(self.options.additional_target)

    def _new_rows(self, model: Any, new_tokens: range) -> dict[str, list[int]] | None:
        """Train just the new tokens' rows, in the head too where it has rows of its own; not where they are trained whole."""
        names = set(_embeddings(model)) - self._whole
        rows = {name: list(new_tokens) for name in sorted(names)}
        return rows if rows and new_tokens and not self._trains_tied(model) else None

    def _trains_tied(self, model: Any) -> bool:
        """Whether the embedding is trained whole while it is the head as well: the two must stay one."""
        layers = [model.get_output_embeddings(), model.get_input_embeddings()]
        tied = layers[0] is not None and layers[0].weight is layers[1].weight
        return tied and any(module in layers for name, module in _named(model) if name in self._whole)

    @property
    def _whole(self) -> set[str]:
        """The last names of `additional_target`."""
        return {name.rpartition(".")[2] for name in self.options.additional_target}


def _any_transposed(model: Any, targets: Sequence[str]) -> bool:
    """Whether a target holds its weights the other way round, as GPT-2's layers do."""
    from transformers.pytorch_utils import Conv1D

    return any(
        isinstance(module, Conv1D) for path, module in model.named_modules() if path.rpartition(".")[2] in targets or path in targets
    )


def _named(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules by their last names."""
    return ((path.rpartition(".")[2], module) for path, module in model.named_modules())


def _embeddings(model: Any) -> list[str]:
    """The last names of the modules that hold a row for every token; the head counts where it is not tied to the embedding."""
    layers = {id(layer.weight): layer for layer in (model.get_output_embeddings(), model.get_input_embeddings()) if layer is not None}
    return [name for name, module in _named(model) if module in layers.values()]


def _open(model: Any, folder: Path, is_trainable: bool = False) -> Any:
    """The model with the adapter in `folder` beside its weights."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise UserError(f"the adapter in {folder} does not fit this model: {reason}") from None


def _saves_lean(model: Any) -> Any:
    """Where embeddings have grown, peft would save them whole, new and old rows, beside the new rows that the adapter holds."""
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model
