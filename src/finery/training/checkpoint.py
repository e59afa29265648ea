"""Optimizer, scheduler and random states as safetensors and JSON: nothing pickled is written or read."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from finery.errors import UserError
from finery.files import usual_modes
from finery.log import get_logger

log = get_logger(__name__)

TENSOR = "__tensor__"
"""In the JSON part, `{TENSOR: name}` stands for a tensor of the safetensors file."""
PAIRS = "__pairs__"
"""A dict whose keys are not text is written as a list of pairs."""


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


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step; one without a trainer_state.json was not finished and does not count."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists() and path.name.split("-")[1].isdigit()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def starting_point(folder: Path, resume: str | bool | None, overwrite: bool, has_model: bool) -> Path | None:
    """The checkpoint to go on with, or nothing for a fresh start.

    A folder with a run in it is gone on with, or cleared where `overwrite`. Raises `UserError` where `resume`
    names no checkpoint, or where the folder holds a finished model and no checkpoint.
    """
    if isinstance(resume, str):
        if not (Path(resume) / "trainer_state.json").exists():
            raise UserError(f"'resume_from_checkpoint': {resume} holds no finished checkpoint (no trainer_state.json)")
        return Path(resume)
    found = newest(folder)
    if resume and found is None:
        raise UserError(f"'resume_from_checkpoint: true': there is no checkpoint in {folder}")
    if overwrite and not resume:
        _clear(folder)
        return None
    if found is not None:
        log.info("going on with %s; 'overwrite_output_dir: true' would start anew", found)
    elif has_model:
        raise UserError(f"'output_dir': {folder} holds a trained model already; set 'overwrite_output_dir: true' or name another folder")
    return found


def _clear(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        log.info("removing %s, as 'overwrite_output_dir' asks", path)
        shutil.rmtree(path)
    (folder / "trainer_log.jsonl").unlink(missing_ok=True)
