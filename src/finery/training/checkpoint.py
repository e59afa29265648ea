"""Optimizer, scheduler and random states as safetensors and JSON: nothing pickled is written or read."""

import json
import random
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from finery.errors import UserError
from finery.files import usual_modes
from finery.log import get_logger
from finery.models.shards import Shards

log = get_logger(__name__)

TENSOR = "__tensor__"
"""In the JSON part, `{TENSOR: name}` stands for a tensor of the safetensors file."""
PAIRS = "__pairs__"
"""A dict whose keys are not text is written as a list of pairs."""

FEW_BITS = "__few_bits__"
"""Marks a wrapper of torchao's: its class, the tensors in it, and what else it was made with."""
WRAPPERS = {f"OptimState{word}": f"torchao.optim.subclass_{word.lower()}" for word in ("8bit", "4bit", "Fp8")}
"""Where their classes lie. No other is ever made from a file."""


def save_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write a nested state of numbers, texts, lists, dicts and tensors as <name>.json and <name>.safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    (folder / f"{name}.json").write_text(json.dumps(_plain(state, tensors)), encoding="utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
        usual_modes(folder)


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """Read what `save_state` wrote."""
    path = folder / f"{name}.safetensors"
    tensors = load_file(path) if path.exists() else {}
    return _rich(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if (kind := type(value).__name__) in WRAPPERS:
        names, others = value.__tensor_flatten__()
        parts = {name: _plain(getattr(value, name), tensors) for name in names}
        return {FEW_BITS: kind, "parts": parts, "others": [str(o) if isinstance(o, torch.dtype) else _plain(o, tensors) for o in others]}
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(item, tensors) for key, item in value.items()}
        return {PAIRS: [[key, _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_plain(item, tensors) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be saved without pickle")


def _rich(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_rich(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if FEW_BITS in value:
        others = [tuple(o) if isinstance(o, list) else getattr(torch, o[6:]) if isinstance(o, str) else o for o in value["others"]]
        wrapper = getattr(import_module(WRAPPERS[value[FEW_BITS]]), value[FEW_BITS])
        return wrapper.__tensor_unflatten__(_rich(value["parts"], tensors), others)
    if PAIRS in value:
        return {key: _rich(item, tensors) for key, item in value[PAIRS]}
    return {key: _rich(item, tensors) for key, item in value.items()}


def random_states() -> dict[str, Any]:
    """The states of every random number generator in use."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set every generator to what `random_states` saw."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


WRITTEN = (
    "checkpoint-[0-9]*",
    "trainer_log.jsonl",
    "trainer_state.json",
    "*_results.json",
    "training_*.png",
    "adapter_*",
    "model*.safetensors*",
)
"""What a run writes that another run in the same folder would not write over."""


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


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint can be gone on with: it holds its state, whole, and the optimizer's."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / "optimizer.json").exists() and (folder / "scheduler.json").exists()


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[1].isdigit() and is_complete(path)]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def starting_point(folder: Path, resume: str | bool | None, overwrite: bool, has_model: bool) -> Path | None:
    """The checkpoint to go on with, or nothing for a fresh start.

    A folder with a run in it is gone on with, unless `overwrite`. Raises `UserError` where `resume` names no complete
    checkpoint, or where the folder holds a finished model and no checkpoint.
    """
    if isinstance(resume, str):
        if not is_complete(Path(resume)):
            lacks = "trainer_state.json, optimizer.json and scheduler.json are needed, whole"
            raise UserError(f"'resume_from_checkpoint': {resume} holds no complete checkpoint ({lacks})")
        return Path(resume)
    found = newest(folder)
    if resume and found is None:
        raise UserError(f"'resume_from_checkpoint: true': there is no complete checkpoint in {folder}")
    if overwrite and not resume:
        return None
    if resume is False and (found is not None or has_model):
        raise UserError(f"'output_dir': {folder} holds a run already; set 'overwrite_output_dir: true' or name another folder")
    if found is not None:
        log.info("going on with %s; 'overwrite_output_dir: true' would start anew", found)
    elif has_model:
        raise UserError(f"'output_dir': {folder} holds a trained model already; set 'overwrite_output_dir: true' or name another folder")
    return found


def check_not_done(start: Path, num_steps: int) -> None:
    """Raise a `UserError` where a checkpoint has no step left to go on with."""
    step = json.loads((start / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if step >= num_steps:
        raise UserError(
            f"{start} is the end of a run of {num_steps} steps: set 'overwrite_output_dir: true' to train anew, or train longer"
        )


def clear(folder: Path) -> None:
    """Remove what an earlier run has written, so that nothing of it is taken for this one's."""
    for path in sorted(path for pattern in WRITTEN for path in folder.glob(pattern)):
        log.info("removing %s, as 'overwrite_output_dir' asks", path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
