"""What a run has trained, found again: for chat, export and whoever goes on with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finery.errors import UserError
from finery.log import get_logger
from finery.models.adapters.base import Adapter
from finery.models.load import ModelOptions, fit_vocabulary, load_model, locate_adapters, locate_model, own_dtype
from finery.models.loftq import held_in
from finery.models.peft_adapter import open_adapter
from finery.models.precision import inference_dtype
from finery.models.quantized import is_held, own_quantization, widen
from finery.models.quantizers.base import Quantizing
from finery.models.rope import to_serve, trained_positions

if TYPE_CHECKING:
    import torch

log = get_logger(__name__)

RUN_FILE = "run.yaml"
"""The resolved settings of a run, in its folder."""


@dataclass(frozen=True)
class Trained:
    """A base folder and the adapters that go into it, in order."""

    base: Path
    adapters: Sequence[Path] = ()
    is_tuned: bool = False
    rope_scaling: str | None = None  # asked for where no run of ours has trained it

    @property
    def positions(self) -> Callable[[Any], None] | None:
        """How to change the base's config to the positions that the adapters were trained with; nothing where it tells them."""
        found = (trained_positions(folder) for folder in reversed(self.adapters))
        return next((change for change in found if change is not None), None)

    @property
    def change(self) -> Callable[[Any], None] | None:
        """The same to answer with; where no run of ours has trained anything here, `rope_scaling` counts."""
        folders = (self.base, *self.adapters)
        is_ours = any((folder / RUN_FILE).exists() or (folder.parent / RUN_FILE).exists() for folder in folders)
        return self.positions or (partial(to_serve, self.rope_scaling) if self.rope_scaling and not is_ours else None)

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer that was trained with, where the adapter brings it."""
        brought = [folder for folder in self.adapters if (folder / "tokenizer_config.json").exists()]
        return brought[-1] if brought else self.base


def find_trained(options: ModelOptions, adapter: Adapter, output_dir: str | None) -> Trained:
    """`adapter_name_or_path`, else what a finished run left in `output_dir`, else the base model alone.

    The adapters that the run in `output_dir` itself started from are a part of what it left, so the very file that
    was trained with serves: those that it merged, and then its own.
    """
    folder = Path(output_dir) if output_dir is not None and is_finished(Path(output_dir), adapter) else None
    started, merged = _start_of(folder) if folder and adapter.takes_adapters else ([], [])
    named = list(options.adapter_name_or_path)
    if named and (folder is None or named != started):
        if folder and output_dir not in named:
            log.warning("'adapter_name_or_path' counts, not what was trained in %s; name that folder there to take it", output_dir)
        return Trained(locate_model(options), locate_adapters(options), True, options.rope_scaling)
    if folder is None:
        return Trained(locate_model(options), rope_scaling=options.rope_scaling)
    log.info("taking the trained model in %s%s", folder, f" after {', '.join(merged)}" if merged else "")
    if not adapter.takes_adapters:
        return Trained(folder, is_tuned=True)
    before = locate_adapters(options.model_copy(update={"adapter_name_or_path": tuple(merged)}))
    return Trained(locate_model(options), [*before, folder], True)


def _start_of(folder: Path) -> tuple[list[str], list[str]]:
    """The adapters that a run started from, and those of them that it merged into its base, as its run.yaml tells."""
    path = folder / RUN_FILE
    settings = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    started = list(settings.get("adapter_name_or_path") or [])
    return started, started if settings.get("create_new_adapter") else started[:-1]


def is_finished(folder: Path, adapter: Adapter) -> bool:
    """Whether a run ended here: its weights and their config lie in the folder itself, not only in checkpoints."""
    weights = (folder / adapter.model_file, folder / f"{adapter.model_file}.index.json")
    return (folder / adapter.config_file).exists() and any(path.exists() for path in weights)


def checkpoint_hint(folder: Path) -> str:
    """What to take instead of a model that was never finished."""
    found = sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: (len(path.name), path.name))
    return f"; its newest checkpoint is {found[-1]}: name it as 'adapter_name_or_path' or 'model_name_or_path'" if found else ""


def load_trained(
    trained: Trained, adapter: Adapter, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype, merge_on: torch.device
) -> Any:
    """The model in `dtype`; adapters are merged into it in fp32 on `merge_on`, so that they lose nothing to rounding.

    A base that comes in few bits is widened for that; raises `UserError` where its format cannot be.
    """
    import torch

    merges = bool(trained.adapters)
    model = _wide_base(trained, tokenizer, trust_remote_code, torch.float32 if merges else dtype)
    return adapter.merge(model.to(merge_on), trained.adapters).to(dtype) if merges else model


def load_beside(trained: Trained, adapter: Adapter, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype) -> Any:
    """The model with its last adapter beside its weights, and those before it in them: what an export is compared with."""
    model = _wide_base(trained, tokenizer, trust_remote_code, dtype)
    if not trained.adapters:
        return model
    return open_adapter(adapter.merge(model, trained.adapters[:-1]), trained.adapters[-1])


def load_again(
    trained: Trained,
    adapter: Adapter,
    tokenizer: Any,
    options: ModelOptions,
    asked: Quantizing | None,
    where: tuple[torch.dtype, torch.device],
) -> Any:
    """The model as it was trained: beside weights of as many bits; `where` is the number format of the others, and the device."""
    dtype, device = where
    if held_in(trained.adapters) or not (asked or own_quantization(trained.base)):
        return load_beside(trained, adapter, tokenizer, options.trust_remote_code, dtype).to(device)
    model = load_model(trained.base, dtype, options.trust_remote_code, asked, device, trained.change)
    fit_vocabulary(model, tokenizer, resize=bool(trained.adapters))
    return (adapter.put_on if is_held(model) else adapter.merge)(model, trained.adapters)


def _wide_base(trained: Trained, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype) -> Any:
    """The base in `dtype` with rows for all tokens; layers of few bits are widened."""
    asked, held = held_in(trained.adapters) or (None, dtype)
    model = load_model(trained.base, held, trust_remote_code, asked, change=trained.change)
    if is_held(model):
        log.info("%s %s in few bits: its layers are widened", trained.base, "was trained" if asked else "comes")
        model = widen(model, dtype).to(dtype)
    fit_vocabulary(model, tokenizer, resize=bool(trained.adapters))
    return model


def load_answering(
    trained: Trained, adapter: Adapter, tokenizer: Any, options: ModelOptions, asked: Quantizing | None, device: torch.device
) -> Any:
    """The model as it answers: on `device`, adapters merged; beside its weights where those are held in few bits, as they were trained."""
    import torch

    dtype = inference_dtype(options.infer_dtype, trained_dtype(trained, options), device)
    if asked is None and not own_quantization(trained.base):
        return load_trained(trained, adapter, tokenizer, options.trust_remote_code, dtype, torch.device("cpu")).to(device)
    model = load_model(trained.base, dtype, options.trust_remote_code, asked, device, trained.change)
    fit_vocabulary(model, tokenizer, resize=bool(trained.adapters))
    if any(weight.device != device for weight in model.parameters()) and not (asked and asked.device_map):
        model = model.to(device)
    return (adapter.put_on if is_held(model) else adapter.merge)(model, trained.adapters)


def trained_dtype(trained: Trained, options: ModelOptions) -> torch.dtype:
    """The number format of the model that was tuned, also where a run has trained all of it in fp32.

    Where that model can no longer be had, the format of what was trained.
    """
    folder = trained.base
    if trained.is_tuned and not trained.adapters:  # the base is the run's own output, not the model it began with
        with contextlib.suppress(UserError):
            folder = locate_model(options)
    return own_dtype(folder, options.trust_remote_code)
