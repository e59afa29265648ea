"""Runs: all that have been, their curves over each other, and what two of them had not in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from finery.errors import UserError
from finery.web.board import Board
from finery.web.curves import picture
from finery.web.past import Past, differing, overlaid, past_runs
from finery.web.sheet import sheet
from finery.web.texts import Texts

_TWO = 2


def build(board: Board) -> None:
    """Draw it."""
    with gr.Row():
        board.add("runs.chosen", gr.Dropdown, choices=[], value=[], multiselect=True, max_choices=8, scale=4)
        board.add("runs.refresh_btn", gr.Button, size="sm", min_width=110, scale=0)
    board.parts["runs.table"] = gr.HTML(elem_id="runs-table")
    board.add("runs.curves", gr.HTML)
    with gr.Row():
        board.add("runs.compare_btn", gr.Button, size="sm", min_width=160, scale=0)
    board.add("runs.differences", gr.HTML)
    parts, shown = board.parts, ["runs.chosen", "runs.table", "runs.curves"]
    board.on([parts["tabs.runs"].select, parts["runs.refresh_btn"].click], lambda held: _list(board, held), ["runs.chosen"], shown)
    board.on(parts["runs.chosen"].change, lambda held: _overlay(board, held), ["runs.chosen"], ["runs.curves"])
    board.on(parts["runs.compare_btn"].click, lambda held: _compare(board, held), ["runs.chosen"], ["runs.differences"])


def _list(board: Board, held: Mapping[str, Any]) -> tuple[Any, Any, str]:
    there = past_runs(board.roots)
    names = [run.name for run in there]
    chosen = [name for name in held["runs.chosen"] or [] if name in names] or names[:1]
    words = board.texts.part("runs.table")
    rows = sheet(words["headers"], [run.row for run in there], caption=words["label"])
    return gr.update(choices=names, value=chosen), rows, _picture([run for run in there if run.name in chosen], board.texts)


def _chosen(board: Board, held: Mapping[str, Any]) -> list[Past]:
    there = {run.name: run for run in past_runs(board.roots)}
    return [there[name] for name in held["runs.chosen"] or [] if name in there]


def _overlay(board: Board, held: Mapping[str, Any]) -> str:
    return _picture(_chosen(board, held), board.texts)


def _picture(chosen: list[Past], spoken: Texts) -> str:
    return picture(spoken.say("loss_smoothed"), overlaid(chosen), spoken.say("no_points"))


def _compare(board: Board, held: Mapping[str, Any]) -> str:
    chosen = _chosen(board, held)
    if len(chosen) != _TWO:
        raise UserError(board.texts.say("choose_two"))
    headers = [board.texts.say("key"), *(run.name for run in chosen)]
    return sheet(headers, differing(*chosen))
