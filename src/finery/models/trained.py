"""What a run has trained, found again: for chat, export and whoever goes on with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finery.log import get_logger
from finery.models.adapters.base import Adapter
from finery.models.load import ModelOptions, fit_vocabulary, load_model, locate_adapters, locate_model, own_dtype

log = get_logger(__name__)


@dataclass(frozen=True)
class Trained:
    """A base folder and the adapters that go into it, in order."""

    base: Path
    adapters: Sequence[Path] = ()
    is_tuned: bool = False

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer that was trained with, where the adapter brings it."""
        brought = [folder for folder in self.adapters if (folder / "tokenizer_config.json").exists()]
        return brought[-1] if brought else self.base


def find_trained(options: ModelOptions, adapter: Adapter, output_dir: str | None) -> Trained:
    """`adapter_name_or_path`, else what a finished run left in `output_dir`, else the base model alone."""
    finished = output_dir is not None and is_finished(Path(output_dir), adapter)
    if options.adapter_name_or_path:
        if finished and output_dir not in options.adapter_name_or_path:
            log.warning("'adapter_name_or_path' counts, not what was trained in %s; name that folder there to take it", output_dir)
        return Trained(locate_model(options), locate_adapters(options), True)
    if finished:
        log.info("taking the trained model in %s", output_dir)
        if adapter.takes_adapters:
            return Trained(locate_model(options), [Path(str(output_dir))], True)
        return Trained(Path(str(output_dir)), is_tuned=True)
    return Trained(locate_model(options))


def is_finished(folder: Path, adapter: Adapter) -> bool:
    """Whether a run ended here: its weights and their config lie in the folder itself, not only in checkpoints."""
    weights = (folder / adapter.model_file, folder / f"{adapter.model_file}.index.json")
    return (folder / adapter.config_file).exists() and any(path.exists() for path in weights)


def load_trained(
    trained: Trained, adapter: Adapter, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype, merge_on: torch.device
) -> Any:
    """The model in `dtype`; adapters are merged into it in fp32 on `merge_on`, so that they lose nothing to rounding."""
    merges = bool(trained.adapters)
    model = load_model(trained.base, torch.float32 if merges else dtype, trust_remote_code)
    fit_vocabulary(model, tokenizer, resize=merges)
    return adapter.merge(model.to(merge_on), trained.adapters).to(dtype) if merges else model


def trained_dtype(options: ModelOptions) -> torch.dtype:
    """The number format of the base model, also where a run has trained all of it in fp32."""
    return own_dtype(locate_model(options), options.trust_remote_code)
