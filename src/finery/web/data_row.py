"""Which data sets a run takes, and a look at their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from finery.web.board import Board
from finery.web.rows import RowsPanel, dataset_names


class DataRow:
    """The list of data sets of a tab, which follows its folder, and the button that shows rows."""

    def __init__(self, board: Board, tab: str) -> None:
        self.board, self.tab = board, tab
        with gr.Row():
            board.control(f"{tab}.dataset", choices=dataset_names(board.roots, "data"), scale=4)
            board.add(f"{tab}.preview_btn", gr.Button, scale=1, min_width=120)
        self.rows = RowsPanel(board, tab)

    def wire(self, ids: Sequence[str], keys: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        """`keys` makes a run of what the parts `ids` hold."""
        parts, folder, shown = self.board.parts, f"{self.tab}.dataset_dir", f"{self.tab}.dataset"
        self.board.on([parts[folder].change, parts[shown].focus], self._list, [folder], [shown])
        self.rows.wire(parts[f"{self.tab}.preview_btn"], ids, keys)

    def _list(self, held: Mapping[str, Any]) -> Any:
        return gr.update(choices=dataset_names(self.board.roots, held[f"{self.tab}.dataset_dir"]))
