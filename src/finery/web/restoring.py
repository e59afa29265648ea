"""A form as it was: the keys of a run, or settings that were saved, as what the controls of a tab hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from finery.web.arguments import to_values
from finery.web.board import Board
from finery.web.form import controls
from finery.web.named import name_of

FIXED: Mapping[str, Mapping[str, Any]] = {
    "train": {"do_train": True, "plot_loss": True},
    "eval": {"stage": "sft"},
    "export": {},
}
"""What each tab sets by itself; `Further keys` may say otherwise."""


def form_of(board: Board, told: Mapping[str, Any], tab: str) -> dict[str, Any]:
    """What the controls are to hold for the keys of a run, or for settings that were saved by control ("train.learning_rate")."""
    if any(key in controls() for key in told):
        return {id: value for id, value in told.items() if id in board.parts and controls_of(id, tab)}
    keys = {key: value for key, value in told.items() if key not in FIXED["train"] and (key, value) not in FIXED[tab].items()}
    found = {f"{tab}.output_dir": keys.pop("output_dir", "")} if f"{tab}.output_dir" in board.parts else {}
    values, rest = to_values(keys, tab)
    for key in ("eval_strategy", "eval_steps", "per_device_eval_batch_size") if values.get("train.val_size") else ():
        rest.pop(key, None)
    adapters = rest.pop("adapter_name_or_path", [])
    values["top.checkpoint_path"] = adapters if isinstance(adapters, list) else str(adapters).split(",")
    values["top.model_name"] = name_of(values["top.model_path"])
    if f"{tab}.newest" in board.parts:
        found[f"{tab}.newest"] = False  # the model as it came, where no checkpoint is told
    found[f"{tab}.more"] = yaml.safe_dump(rest, sort_keys=False, allow_unicode=True) if rest else ""
    return {id: value for id, value in values.items() if id in board.parts} | found


def controls_of(id: str, tab: str) -> bool:
    """Whether settings of a tab hold this control."""
    return id in controls() and controls()[id].tab in ("top", tab)
