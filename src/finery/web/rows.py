"""The very rows that a run would train on, before it does: tokens that are learnt in colour, cuts marked."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import gradio as gr

from finery.data.registry import read_catalogue
from finery.errors import UserError
from finery.previews.rows import Preview
from finery.previews.terminal import pieces, title
from finery.run import Run
from finery.web.board import Board
from finery.web.roots import Roots
from finery.web.texts import Texts

PER_PAGE = 2
_ONE = threading.Lock()  # tokenizers and caches of rows are used by one look at a time


def dataset_names(roots: Roots, folder: Any) -> list[str]:
    """What dataset_info.json in a folder names; nothing where it cannot be read."""
    try:
        roots.look_at({"dataset_dir": folder})
        found = read_catalogue(str(folder or "data"), None)
    except UserError:
        return []
    return sorted(found.entries) if found else []


class RowsPanel:
    """A fold-out page of rows, with ways to go through them."""

    def __init__(self, board: Board, tab: str) -> None:
        self.board, self.tab = board, tab
        with gr.Column(visible=False, elem_id=f"{tab}-rows") as self.box:
            board.add(f"{tab}.preview_samples", gr.HTML)
            with gr.Row():
                board.add(f"{tab}.prev_btn", gr.Button, size="sm", min_width=80)
                board.add(f"{tab}.page_index", gr.Number, value=0, precision=0, minimum=0, min_width=80)
                board.add(f"{tab}.next_btn", gr.Button, size="sm", min_width=80)
                board.add(f"{tab}.close_btn", gr.Button, size="sm", min_width=80)
        board.parts[f"{tab}.rows"] = self.box

    def wire(self, button: Any, ids: Sequence[str], keys: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        """`keys` makes a run of what the parts `ids` hold."""
        board, tab = self.board, self.tab
        held_ids = [*ids, f"{tab}.page_index"]
        shown = [f"{tab}.rows", f"{tab}.preview_samples", f"{tab}.page_index"]
        for event, turn in ((button.click, None), (board.parts[f"{tab}.prev_btn"].click, -1), (board.parts[f"{tab}.next_btn"].click, 1)):
            board.on(event, lambda held, turn=turn: self._turn(held, turn, keys), held_ids, shown, show_progress="full")
        board.on(board.parts[f"{tab}.page_index"].submit, lambda held: self._turn(held, 0, keys), held_ids, shown, show_progress="full")
        board.on(board.parts[f"{tab}.close_btn"].click, lambda held: gr.update(visible=False), [], [f"{tab}.rows"])

    def _turn(self, held: Mapping[str, Any], turn: int | None, keys: Callable[[Mapping[str, Any]], dict[str, Any]]) -> tuple[Any, str, int]:
        page = 0 if turn is None else max(int(held[f"{self.tab}.page_index"] or 0) + turn, 0)
        return gr.update(visible=True), rows_page(keys(held), page, self.board.texts), page


def rows_page(keys: Mapping[str, Any], page: int, spoken: Texts) -> str:
    """One page of rows as HTML. Raises `UserError` for a run that cannot be."""
    run = Run.from_dict(dict(keys))
    if not (run.data.dataset or run.data.eval_dataset):
        raise UserError("no data set is chosen")
    with _ONE:
        preview = Preview(run)
        try:
            shown = list(islice(preview.samples(), page * PER_PAGE, (page + 1) * PER_PAGE))
            total = sum(len(units.samples) for units in preview.sets.by_name.values())
            articles = [_article(title(each), list(pieces(preview, each))) for each in shown]
        finally:
            preview.sets.stop()
    legend = spoken.say("rows_legend", total=f"{total:,}", pages=f"{-(-total // PER_PAGE):,}")
    return f"<p>{html.escape(legend)}</p>{''.join(articles) or html.escape(spoken.say('no_more_rows'))}"


def _article(name: str, parts: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in parts)
    return f'<article class="row"><h4>{html.escape(name)}</h4><pre>{body}</pre></article>'
