"""Weights of a checkpoint into the model that goes on with them."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from finery.models.shards import Shards


def load_renamed(model: Any, folder: Path) -> bool:
    """Read the weights of a whole model whose files name them otherwise than its code does; false where nothing was to be done.

    transformers renames weights in `from_pretrained` and in what it saves, and its Trainer (5.23) reads them as they lie in the files: none
    of them would fit. In fp32, which every format goes into; the model keeps its own.
    """
    if not Shards.there(folder) or Shards(folder).files.keys() <= model.state_dict().keys():
        return False
    held = type(model).from_pretrained(str(folder), config=model.config, dtype=torch.float32)
    model.load_state_dict(held.state_dict())
    return True


def keep_formats(model: Any) -> None:
    """An adapter that is read from a checkpoint keeps the number format that this run trains it in.

    peft would widen half precision to fp32, and torch forgets the hooks of a weight whose format changes: lanes take gradients by those.
    """
    if callable(getattr(model, "load_adapter", None)) and hasattr(model, "peft_config"):
        model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)
