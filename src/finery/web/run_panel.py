"""What stands at the end of every tab that starts a run: its settings as a file, its command, a check, the start, and how it goes."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import gradio as gr

from finery.errors import UserError
from finery.web.arguments import Keys, as_command, as_yaml
from finery.web.board import Board
from finery.web.live import Live
from finery.web.restoring import form_of
from finery.web.saves import load_settings, new_name, runs_of, save_settings, saved_settings
from finery.web.starting import checked, start_run


class RunPanel(ABC):
    """Draw it when all of the tab's controls are there."""

    tab: ClassVar[str]
    verb: ClassVar[str]  # names of its jobs and folders begin with it
    command: ClassVar[str] = "train"
    typed: ClassVar[tuple[str, ...]] = ("output_dir", "more")  # what beside the controls makes a run
    has_curves: ClassVar[bool] = False

    def __init__(self, board: Board) -> None:
        self.board = board
        self._draw()
        self.ids = [*board.of("top", self.tab), *(f"{self.tab}.{name}" for name in self.typed)]
        self.live = Live(board, self.tab, self.verb, self.has_curves)
        self._wire()

    @abstractmethod
    def keys(self, held: Mapping[str, Any]) -> Keys:
        """The keys of the run that the tab describes; raises `UserError` for what is missing."""

    def check(self, keys: Keys) -> str:
        """What is wrong with a run, in words; nothing where nothing is found."""
        return checked(self.board, keys)

    def start(self, held: Mapping[str, Any]) -> Any:
        """Start it; returns an update that watches its job."""
        return self.live.watch(start_run(self.board, self.keys(held), self.verb).id)

    def _draw(self) -> None:
        board, tab = self.board, self.tab
        with gr.Row():
            if "output_dir" in self.typed:
                board.add(f"{tab}.output_dir", gr.Dropdown, choices=[], value="", allow_custom_value=True, scale=2)
            board.add(f"{tab}.config_path", gr.Dropdown, choices=[], value="", allow_custom_value=True, scale=2)
            board.add(f"{tab}.arg_save_btn", gr.Button, size="sm", min_width=120)
            board.add(f"{tab}.arg_load_btn", gr.Button, size="sm", min_width=120)
        with gr.Row():
            board.add(f"{tab}.cmd_preview_btn", gr.Button)
            board.add(f"{tab}.check_btn", gr.Button)
            board.add(f"{tab}.start_btn", gr.Button, variant="primary")
        board.add(f"{tab}.command", gr.Code, language="shell", visible=False, buttons=["copy"], interactive=False)
        board.add(f"{tab}.file", gr.Code, language="yaml", visible=False, buttons=["copy", "download"], interactive=False)
        board.add(f"{tab}.findings", gr.HTML)

    def _wire(self) -> None:
        board, tab, ids = self.board, self.tab, self.ids
        settings = f"{tab}.config_path"

        def part(name: str) -> Any:
            return board.parts[f"{tab}.{name}"]

        board.on(part("cmd_preview_btn").click, self._show, ids, [f"{tab}.command", f"{tab}.file"])
        board.on(part("check_btn").click, self._check, ids, [f"{tab}.findings"], show_progress="full")
        begun = [f"{tab}.job", f"{tab}.findings"]
        board.on(part("start_btn").click, lambda held: (self.start(held), ""), ids, begun, show_progress="full")
        board.on(part("arg_save_btn").click, self._save, [*ids, settings], [settings])
        board.on(part("arg_load_btn").click, self._load, [settings], ids)
        board.on(part("config_path").focus, lambda held: gr.update(choices=saved_settings(board.roots)), [], [settings])
        if "output_dir" in self.typed:
            named = ["top.model_name", "top.model_path", "top.finetuning_type"]
            board.on(part("output_dir").focus, self._list_runs, named, [f"{tab}.output_dir"])

    def _show(self, held: Mapping[str, Any]) -> tuple[Any, Any]:
        keys = self.keys(held)
        return gr.update(value=as_command(keys, self.command), visible=True), gr.update(value=as_yaml(keys), visible=True)

    def _check(self, held: Mapping[str, Any]) -> str:
        told = self.check(self.keys(held)) or self.board.texts.say("nothing_found")
        return f'<pre class="log" tabindex="0">{html.escape(told)}</pre>'

    def _save(self, held: Mapping[str, Any]) -> Any:
        roots, name = self.board.roots, held[f"{self.tab}.config_path"] or new_name("settings")
        path = save_settings(roots, name, as_yaml(self.keys(held)))
        gr.Info(self.board.texts.say("saved_in", path=path))
        return gr.update(choices=saved_settings(roots), value=path)

    def _load(self, held: Mapping[str, Any]) -> dict[str, Any]:
        if not (name := held[f"{self.tab}.config_path"]):
            raise UserError("no file of settings is chosen")
        return form_of(self.board, load_settings(self.board.roots, name), self.tab)

    def _list_runs(self, held: Mapping[str, Any]) -> Any:
        return gr.update(choices=[new_name(self.verb), *runs_of(self.board.roots, held)])


def need_data(held: Mapping[str, Any], tab: str) -> None:
    """Raise `UserError` where a tab names no data set."""
    if not held[f"{tab}.dataset"] and "dataset" not in (held[f"{tab}.more"] or ""):
        raise UserError("no data set is chosen")
