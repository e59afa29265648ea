"""Every key that has no control of its own: searched, explained, and added to the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from finery.errors import UserError
from finery.keys import all_keys, default_words, type_words
from finery.web.arguments import as_yaml, more_keys
from finery.web.board import Board
from finery.web.form import controls


class KeysPanel:
    """A search over all keys, what the chosen one means, a value for it, and the lines that go into the run."""

    def __init__(self, board: Board, tab: str) -> None:
        self.board, self.tab = board, tab
        drawn = {key for control in controls().values() if control.tab in ("top", tab) for key in control.keys}
        self.known = {key.name: key for key in all_keys() if key.name not in drawn}
        with gr.Accordion(board.texts.section(f"{tab}.all_keys"), open=False, elem_id=f"section-{tab}-all-keys") as made:
            board.parts[f"section.{tab}.all_keys"] = made
            with gr.Row():
                board.add(f"{tab}.key_search", gr.Dropdown, choices=self._choices(), value=None, filterable=True, scale=3)
                board.add(f"{tab}.key_value", gr.Textbox, scale=2, max_lines=1)
                board.add(f"{tab}.key_add_btn", gr.Button, size="sm", min_width=90)
            board.add(f"{tab}.key_help", gr.Markdown)
            board.add(f"{tab}.more", gr.Code, language="yaml", lines=3, interactive=True)
        parts = board.parts
        shown = [f"{tab}.key_help", f"{tab}.key_value"]
        board.on(parts[f"{tab}.key_search"].change, self._explain, [f"{tab}.key_search"], shown)
        typed = [f"{tab}.{name}" for name in ("key_search", "key_value", "more")]
        board.on([parts[f"{tab}.key_add_btn"].click, parts[f"{tab}.key_value"].submit], self._add, typed, [f"{tab}.more"])

    def _choices(self) -> list[tuple[str, str]]:
        """Found by name, by whose it is, and by what it means."""
        return [(f"{name} — {key.schema['description'].splitlines()[0][:90]} ({key.owner})", name) for name, key in self.known.items()]

    def _explain(self, held: Mapping[str, Any]) -> tuple[str, str]:
        key = self.known.get(held[f"{self.tab}.key_search"] or "")
        if key is None:
            return "", ""
        default = default_words(key)
        return (
            f"`{key.name}`: {key.schema['description']}\n\n*{type_words(key.schema)}; {default}*",
            "" if default == "not set" else default,
        )

    def _add(self, held: Mapping[str, Any]) -> str:
        name, value = held[f"{self.tab}.key_search"], held[f"{self.tab}.key_value"]
        if not name:
            raise UserError("no key is chosen")
        return as_yaml(more_keys(held[f"{self.tab}.more"] or "") | more_keys(f"{name}: {value}"))
