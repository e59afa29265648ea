"""Where the board's runs write, and what is found there: saves/MODEL/TYPE/NAME."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from finery.errors import UserError
from finery.files import replace_text
from finery.models.trained import RUN_FILE
from finery.web.named import CUSTOM, name_of
from finery.web.roots import Roots

SAVES = "saves"
SETTINGS = ("board", "llamaboard_config")
"""Folders of saved settings; the first is written to."""
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_UNFIT = re.compile(r"[^\w.()-]+")
_NOT_GIVEN = re.compile(r"^.*  # (default|decided: .*)$", re.M)  # what a run has written of itself, where nobody had set it
_MOST_LISTED = 200


def model_folder(held: Mapping[str, Any]) -> str:
    """What a model's folder is called."""
    name = name_of(held["top.model_path"], held["top.model_name"])  # a path that has just been typed is not named yet
    if name == CUSTOM:
        name = Path(str(held["top.model_path"] or CUSTOM).rstrip("/")).name
    return _UNFIT.sub("-", name.replace(" (demo)", "")).strip("-.") or CUSTOM


def output_dir(held: Mapping[str, Any], name: str, roots: Roots) -> str:
    """The run's folder: in saves/MODEL/TYPE, or `name` itself where it is a path. Raises `UserError` for one that is outside."""
    if not name.strip():
        raise UserError("'output_dir' is empty: give the run a name")
    found = name if "/" in name else f"{SAVES}/{model_folder(held)}/{held['top.finetuning_type']}/{name.strip()}"
    roots.path(found, "output_dir")
    return found


def new_name(prefix: str) -> str:
    """Of a run that begins now."""
    return time.strftime(f"{prefix}_%Y-%m-%d-%H-%M-%S")


def runs_of(roots: Roots, held: Mapping[str, Any]) -> list[str]:
    """The names of what this model has been tuned to in this way, the newest first."""
    folder = roots.home / SAVES / model_folder(held) / str(held["top.finetuning_type"])
    there = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")] if folder.is_dir() else []
    return [path.name for path in sorted(there, key=lambda path: path.stat().st_mtime, reverse=True)][:_MOST_LISTED]


def checkpoints(roots: Roots, held: Mapping[str, Any], adapters: bool) -> list[str]:
    """Folders with weights, finished runs and their checkpoints, as paths from the page's own folder."""
    base = Path(SAVES) / model_folder(held) / str(held["top.finetuning_type"])
    found = []
    for name in runs_of(roots, held):
        run = base / name
        for folder in (run, *sorted((roots.home / run).glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))):
            own = roots.home / folder
            if any((own / file).is_file() for file in _WEIGHTS) and (own / "adapter_config.json").is_file() == adapters:
                found.append(str(own.relative_to(roots.home)))
    return found


def saved_settings(roots: Roots) -> list[str]:
    """Files of settings, the newest first, and after them those that runs have written of themselves."""
    saved = [path for folder in SETTINGS for path in (roots.home / folder).glob("*.yaml")]
    runs = list((roots.home / SAVES).glob(f"*/*/*/{RUN_FILE}"))
    newest_first = [sorted(filter(Path.is_file, some), key=lambda path: path.stat().st_mtime, reverse=True) for some in (saved, runs)]
    return [str(path.relative_to(roots.home)) for some in newest_first for path in some][:_MOST_LISTED]


def save_settings(roots: Roots, name: str, text: str) -> str:
    """Write a run's file; returns where."""
    name = Path(name.strip()).name.removesuffix(".yaml")
    if not name or _UNFIT.search(name) or name.startswith("."):
        raise UserError(f"a file of settings is named by letters, digits, '-', '_' and '.', found {name!r}")
    path = roots.path(f"{SETTINGS[0]}/{name}.yaml", "config_path")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)
    return str(path.relative_to(roots.home))


def load_settings(roots: Roots, name: str) -> dict[str, Any]:
    """What a file of settings holds: keys of a run, or what controls held ("train.learning_rate"). Raises `UserError`."""
    path = roots.path(name if "/" in name else f"{SETTINGS[0]}/{name}", "config_path")
    try:
        text = path.read_text(encoding="utf-8")
        told = yaml.safe_load(_NOT_GIVEN.sub("", text) if path.name == RUN_FILE else text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{name} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(told, dict):
        raise UserError(f"{name} should hold lines of 'key: value'")
    return {str(key): value for key, value in told.items()}
