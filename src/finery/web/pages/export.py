"""Export: what was trained, written in the form that others load, and compared with what was trained."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from finery.run import Run
from finery.web.arguments import Keys
from finery.web.board import Board
from finery.web.keys_panel import KeysPanel
from finery.web.live import Live
from finery.web.parity_table import REPORT, read_report, report_page
from finery.web.restoring import FIXED
from finery.web.results import Results, below
from finery.web.run_panel import RunPanel
from finery.web.saves import SAVES, model_folder
from finery.web.source import Source
from finery.web.starting import gathered

EXPORTS = "exports"


def build(board: Board) -> Live:
    """Draw it."""
    source = Source(board, "export")
    where, *ids = board.section("export", "basics")
    board.control(where, placeholder=f"{EXPORTS}/MODEL-TIME")
    for start in range(0, len(ids), 4):
        board.row(*ids[start : start + 4])
    KeysPanel(board, "export")
    panel = ExportPanel(board, source)
    Reports(board, panel.live)
    return panel.live


class ExportPanel(RunPanel):
    """Runs that write a model."""

    tab = "export"
    verb = "export"
    command = "export"
    typed = ("more", "newest")

    def __init__(self, board: Board, source: Source) -> None:
        self.source = source
        super().__init__(board)

    def keys(self, held: Mapping[str, Any]) -> Keys:
        """The keys of the export that the page describes."""
        name = held["export.export_dir"] or f"{EXPORTS}/{model_folder(held)}-{time.strftime('%Y-%m-%d-%H-%M-%S')}"
        return gathered(self.board, self.source.taken(held), "export", {**FIXED["export"], "export_dir": name.strip()})

    def check(self, keys: Keys) -> str:
        """`finery check` is for what trains; an export is read, which complains of what does not fit together."""
        Run.from_dict(dict(keys))
        return ""


class Reports(Results):
    """Whether exports are what was trained."""

    tab = "export"
    files = (REPORT,)

    def draw(self) -> list[str]:
        """One report."""
        self.board.add("export.report", gr.HTML)
        return ["export.report"]

    def nothing(self) -> dict[str, Any]:
        """No report."""
        return {"export.report": ""}

    def folders(self, held: Mapping[str, Any]) -> Iterator[Path]:
        """Exports of any model, and those that lie beside runs."""
        yield from below(self.board.roots.home / EXPORTS)
        for way in below(self.board.roots.home / SAVES / model_folder(held)):
            yield from below(way)

    def show(self, folder: Path, held: Mapping[str, Any]) -> dict[str, Any]:
        """The report that lies in an export."""
        path = self.board.roots.path(str(folder / REPORT), "result_of")
        return {"export.report": report_page(folder, read_report(path), self.board.texts)}

    def aside(self, folder: Path) -> Path:
        """An export that is not what was trained."""
        return folder.with_name(f"{folder.name}-failed")
