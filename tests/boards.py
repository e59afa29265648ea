"""A board with one tab, drawn without a browser: its events are called as a click would."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from finery.web.board import Board
from finery.web.form import controls
from finery.web.pages import top
from finery.web.roots import Roots


@dataclass
class Drawn:
    """The page, and what its parts hold."""

    blocks: gr.Blocks
    board: Board
    held: dict[str, Any]

    def press(self, id: str, event: str = "click", **changes: Any) -> dict[str, Any]:
        """Let an event of a part happen; returns what it changes, by id, which is then held. `__` stands for the dot of an id."""
        self.held |= {name.replace("__", "."): value for name, value in changes.items()}
        found: dict[str, Any] = {}
        named = {part: name for name, part in self.board.parts.items()}
        for one in self.blocks.fns.values():
            if (self.board.parts[id]._id, event) in one.targets and one.fn is not None:
                told = one.fn(*(self.held[named[part]] for part in one.inputs))
                if not isinstance(told, dict) and len(one.outputs) > 1:
                    told = dict(zip(one.outputs, told, strict=True))
                elif not isinstance(told, dict) or "__type__" in told:
                    told = dict.fromkeys(one.outputs, told)
                found |= {named[part]: update for part, update in told.items() if update != gr.skip()}
        values = {name: value for name, update in found.items() if (value := _value(update)) is not ...}
        self.held |= values
        return found


def _value(update: Any) -> Any:
    if isinstance(update, Mapping) and "__type__" in update:
        return update.get("value", ...)
    return update


def drawn(tab: str, page: Any, home: Path, *more: Path) -> Drawn:
    """A tab below the top, as it is first seen."""
    board = Board(Roots([home.resolve(), *(path.resolve() for path in more)]))

    async def build() -> gr.Blocks:  # where no loop runs, Gradio makes some and leaves them open
        with gr.Blocks() as blocks:
            top.build(board, blocks)
            with gr.Tabs(), gr.Tab(tab) as made:
                board.parts[f"tabs.{tab}"] = made
                page.build(board)
        return blocks

    blocks = asyncio.run(build())
    held = {id: getattr(part, "value", None) for id, part in board.parts.items()}
    return Drawn(blocks, board, held | {id: controls()[id].begins for id in board.parts if id in controls()})
