"""What a run begins with: the checkpoints chosen above, else the newest run of this model, else the model as it came."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from finery.models.adapters import ADAPTERS
from finery.web.board import Board
from finery.web.roots import Roots
from finery.web.saves import checkpoints


def newest_run(roots: Roots, held: Mapping[str, Any]) -> str | None:
    """The finished run of this model, tuned in this way, that wrote last; where none has finished, the newest run's last checkpoint."""
    there = checkpoints(roots, held, ADAPTERS[held["top.finetuning_type"]].takes_adapters)
    finished = next((path for path in there if not _is_checkpoint(path)), None)
    if finished is not None or not there:
        return finished
    return [path for path in there if Path(path).parent == Path(there[0]).parent][-1]


def _is_checkpoint(path: str) -> bool:
    """Whether a folder is a run's on its way."""
    return Path(path).name.startswith("checkpoint-")


class Source:
    """A switch for the newest run, and a line that says what will be taken."""

    def __init__(self, board: Board, tab: str) -> None:
        self.board, self.tab = board, tab
        with gr.Row():
            board.add(f"{tab}.newest", gr.Checkbox, value=True, scale=1, min_width=260)
            board.add(f"{tab}.source", gr.HTML, scale=2, min_width=280)
        chosen = [f"top.{name}" for name in ("model_name", "model_path", "finetuning_type", "checkpoint_path")]
        parts = board.parts
        events = [parts[f"tabs.{tab}"].select, *(parts[id].change for id in (*chosen, f"{tab}.newest"))]
        board.on(events, self.told, [*chosen, f"{tab}.newest"], [f"{tab}.source"], trigger_mode="always_last")

    def taken(self, held: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the page holds, with the newest run as its checkpoint where that counts."""
        if held["top.checkpoint_path"] or not held[f"{self.tab}.newest"] or (run := newest_run(self.board.roots, held)) is None:
            return held
        return {**held, "top.checkpoint_path": [run]}

    def told(self, held: Mapping[str, Any]) -> str:
        """The line."""
        spoken, taken = self.board.texts, self.taken(held)
        model = Path(str(held["top.model_path"] or "")).name
        runs = ", ".join(map(str, taken["top.checkpoint_path"] or []))
        said = spoken.say("source_tuned", model=model, runs=runs) if runs else spoken.say("source_plain", model=model)
        return f'<p class="source">{html.escape(said)}</p>'
