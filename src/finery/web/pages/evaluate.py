"""Evaluate & predict: a model is measured on data sets, and its answers stand beside what the data have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from finery.web.answered import ANSWERS, answer_files, answers_page, scores, scores_table
from finery.web.board import Board
from finery.web.data_row import DataRow
from finery.web.keys_panel import KeysPanel
from finery.web.live import Live
from finery.web.restoring import FIXED
from finery.web.results import Results, below
from finery.web.run_panel import RunPanel, need_data
from finery.web.saves import SAVES, model_folder, new_name
from finery.web.source import Source
from finery.web.starting import gathered


def build(board: Board) -> Live:
    """Draw it."""
    source = Source(board, "eval")
    first, _, *others = board.section("eval", "basics")
    board.row(first)
    data = DataRow(board, "eval")
    for start in range(0, len(others), 4):
        board.row(*others[start : start + 4])
    KeysPanel(board, "eval")
    panel = EvalPanel(board, source)
    data.wire(panel.ids, panel.keys)
    Predictions(board, panel.live)
    return panel.live


class EvalPanel(RunPanel):
    """Runs that measure."""

    tab = "eval"
    verb = "eval"
    typed = ("output_dir", "more", "newest")

    def __init__(self, board: Board, source: Source) -> None:
        self.source = source
        super().__init__(board)

    def keys(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of the run that the page describes."""
        name = held["eval.output_dir"] or new_name("eval")
        return gathered(self.board, self.source.taken(held), "eval", {**FIXED["eval"], "output_dir": name})

    def start(self, held: Mapping[str, Any]) -> Any:
        """Start it; returns an update that watches its job."""
        need_data(held, "eval")
        return super().start(held)


class Predictions(Results):
    """Scores and answers."""

    tab = "eval"
    files = ("predict_results.json", "eval_results.json", ANSWERS)
    reads = ("eval.answers_of", "eval.answers_page")

    def draw(self) -> list[str]:
        """Scores, and a page of answers."""
        board = self.board
        board.add("eval.scores", gr.HTML)
        with gr.Column(visible=False, elem_id="eval-answers-box") as box:
            board.parts["eval.answers_box"] = box
            with gr.Row():
                board.add("eval.answers_of", gr.Dropdown, choices=[], value=None, visible=False, scale=2)
                board.add("eval.answers_prev_btn", gr.Button, size="sm", min_width=80)
                board.add("eval.answers_page", gr.Number, value=0, precision=0, minimum=0, min_width=80)
                board.add("eval.answers_next_btn", gr.Button, size="sm", min_width=80)
            board.add("eval.answers", gr.HTML)
        return ["eval.scores", "eval.answers_box", "eval.answers_of", "eval.answers_page", "eval.answers"]

    def _wire(self) -> None:
        super()._wire()
        board, parts = self.board, self.board.parts
        turns = ((parts["eval.answers_prev_btn"].click, -1), (parts["eval.answers_next_btn"].click, 1))
        for event, turn in (*turns, (parts["eval.answers_page"].submit, 0), (parts["eval.answers_of"].input, 0)):
            board.on(event, lambda held, turn=turn: self._turn(held, turn), self.read_ids, self.shows)
        named = ["eval.output_dir", *self.held_ids]
        board.on(parts["eval.output_dir"].change, self._named_again, named, ["eval.result_of", *self.shows])

    def nothing(self) -> dict[str, Any]:
        """No scores, no answers."""
        return {"eval.scores": "", "eval.answers_box": gr.update(visible=False)}

    def folders(self, held: Mapping[str, Any]) -> Iterator[Path]:
        """Every run of this model."""
        for way in below(self.board.roots.home / SAVES / model_folder(held)):
            yield from below(way)

    def show(self, folder: Path, held: Mapping[str, Any]) -> dict[str, Any]:
        """The scores, and the page of answers that is chosen."""
        roots, spoken, there = self.board.roots, self.board.texts, answer_files(folder)
        found: dict[str, Any] = {
            "eval.scores": scores_table(scores(roots, folder), spoken),
            "eval.answers_box": gr.update(visible=bool(there)),
        }
        if there:
            chosen = held["eval.answers_of"] if held["eval.answers_of"] in there else there[0]
            path = roots.path(str(folder / chosen), "result_of")
            shown, page = answers_page(path, int(held["eval.answers_page"] or 0), spoken)
            found["eval.answers"], found["eval.answers_page"] = shown, page
            found["eval.answers_of"] = gr.update(choices=there, value=chosen, visible=len(there) > 1)
        return found

    def _turn(self, held: Mapping[str, Any], turn: int) -> dict[str, Any]:
        return self.look({**held, "eval.answers_page": max(int(held["eval.answers_page"] or 0) + turn, 0)})

    def _named_again(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """An output folder that is named and holds a result shows it."""
        there = [name for name in self.there(held) if Path(name).name == Path(held["eval.output_dir"] or "").name]
        if not there:
            return {}
        return {"eval.result_of": there[0], **self.look({**self._from_its_start(held), "eval.result_of": there[0]})}
