"""Train: everything that makes a run, its rows before it starts, and how it goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gradio as gr
import yaml

from finery.data.registry import PACKAGED
from finery.models.demo_model import demo_folder
from finery.web.board import Board
from finery.web.data_row import DataRow
from finery.web.form import controls
from finery.web.keys_panel import KeysPanel
from finery.web.live import Live
from finery.web.restoring import FIXED, form_of
from finery.web.run_panel import RunPanel, need_data
from finery.web.saves import new_name
from finery.web.starting import gathered

SECTIONS = ("extra", "lora", "freeze", "oft", "mm", "galore", "apollo", "badam", "swanlab")
HIDDEN = ("freeze", "oft")
"""Until another way to tune is chosen."""
LEFT_OUT = ("overwrite_output_dir", "do_sample", "max_new_tokens", "bf16")
"""Of the demo's own file."""


def build(board: Board) -> Live:
    """Draw it."""
    board.row("train.training_stage", "train.dataset_dir")
    data = DataRow(board, "train")
    ids = board.section("train", "basics")[3:]
    for start in range(0, len(ids), 4):
        board.row(*ids[start : start + 4])
    for section in SECTIONS:
        with board.folded("train", section, visible=section not in HIDDEN):
            ids = board.section("train", section)
            for start in range(0, len(ids), 4):
                board.row(*ids[start : start + 4])
    KeysPanel(board, "train")
    panel = TrainPanel(board)
    data.wire(panel.ids, panel.keys)
    parts, shown = board.parts, [f"section.train.{section}" for section in SECTIONS]
    board.on(parts["top.demo_btn"].click, lambda held: fill_example(board), [], panel.ids)
    board.on(parts["top.finetuning_type"].change, _fitting_sections, ["top.finetuning_type"], shown)
    return panel.live


class TrainPanel(RunPanel):
    """Runs that learn."""

    tab = "train"
    verb = "train"
    has_curves = True

    def keys(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of the run that the page describes."""
        name = held["train.output_dir"] or new_name("train")
        return gathered(self.board, held, "train", {**FIXED["train"], **_evaluating(held), "output_dir": name})

    def start(self, held: Mapping[str, Any]) -> Any:
        """Start it; returns an update that watches its job."""
        need_data(held, "train")
        return super().start(held)


def _evaluating(held: Mapping[str, Any]) -> dict[str, Any]:
    """What is held back is measured as often as is saved."""
    if not held["train.val_size"]:
        return {}
    return {"eval_strategy": "steps", "eval_steps": held["train.save_steps"], "per_device_eval_batch_size": held["train.batch_size"]}


def _fitting_sections(held: Mapping[str, Any]) -> list[Any]:
    """Sections of other ways to tune are put away."""
    chosen = held["top.finetuning_type"]
    found = []
    for section in SECTIONS:
        wanted = next((one.when for one in controls().values() if (one.tab, one.section) == ("train", section) and one.when), {})
        found.append(gr.update(visible=chosen in wanted.get("top.finetuning_type", [chosen])))
    return found


def fill_example(board: Board) -> dict[str, Any]:
    """The run of `finery demo`: a small real model learns who it is, in a few minutes on any machine."""
    text = (PACKAGED / "demo.yaml").read_text(encoding="utf-8")
    filled = {"model": str(demo_folder()), "data": "data", "name": "Finn", "author": "the Finery team", "output": "example"}
    for key, value in filled.items():
        text = text.replace(f"{{{key}}}", json.dumps(value))
    keys = {key: value for key, value in yaml.safe_load(text).items() if key not in LEFT_OUT}
    return form_of(board, keys | {"val_size": 0.05}, "train")
