"""What a run has trained, found again: for chat, export and whoever goes on with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finery.log import get_logger
from finery.models.adapters.base import Adapter
from finery.models.load import ModelOptions, fit_vocabulary, load_model, locate_adapters, locate_model

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
    if options.adapter_name_or_path:
        return Trained(locate_model(options), locate_adapters(options), True)
    if output_dir is not None and is_finished(Path(output_dir), adapter):
        log.info("taking the trained model in %s", output_dir)
        if adapter.takes_adapters:
            return Trained(locate_model(options), [Path(output_dir)], True)
        return Trained(Path(output_dir), is_tuned=True)
    return Trained(locate_model(options))


def is_finished(folder: Path, adapter: Adapter) -> bool:
    """Whether a run ended here: its weights and their config lie in the folder itself, not only in checkpoints."""
    weights = (folder / adapter.model_file, folder / f"{adapter.model_file}.index.json")
    return (folder / adapter.config_file).exists() and any(path.exists() for path in weights)


def load_trained(trained: Trained, adapter: Adapter, tokenizer: Any, trust_remote_code: bool, device: torch.device) -> Any:
    """The model with its adapters merged, computed in fp32."""
    model = load_model(trained.base, torch.float32, trust_remote_code)
    fit_vocabulary(model, tokenizer, resize=bool(trained.adapters))
    return adapter.merge(model.to(device), trained.adapters)
