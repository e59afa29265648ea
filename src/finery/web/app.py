"""The board as a whole: what stands above, the tabs, and what every window finds when it opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default

from finery.models.demo_model import demo_folder
from finery.web.board import Board
from finery.web.chat_box import CSS, ChatBox
from finery.web.form import controls
from finery.web.live import Live
from finery.web.pages import chat, data, evaluate, export, runs, top, train
from finery.web.texts import preferred, texts

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
TABS = {
    "train": train,
    "eval": evaluate,
    "chat": chat,
    "export": export,
    "data": data,
    "runs": runs,
}
"""In the order of the page."""
LOOK: dict[str, Any] = {
    "theme": Default(primary_hue="blue", neutral_hue="slate", radius_size="md", font=["system-ui", "sans-serif"]),
    "css": CSS + STYLE,
}
"""How the page looks, as Gradio's `launch` takes it; fonts are the reader's own, nothing is fetched from elsewhere."""

_OPEN_TAB = "() => { document.getElementById(`tab-${location.hash.slice(1)}-button`)?.click(); window.tabsRestored = true; }"
"""The tab that was open is named in the address; the first one is opened before that is read."""


def build(board: Board) -> gr.Blocks:
    """The page, ready to be served."""
    with gr.Blocks(title="Finery", analytics_enabled=False) as page:
        top.build(board)
        lives: list[Live] = []
        box: ChatBox | None = None
        with gr.Tabs():
            for name, tab in TABS.items():
                with gr.Tab(**texts("en").part(f"tabs.{name}"), id=name, elem_id=f"tab-{name}") as made:
                    board.parts[f"tabs.{name}"] = made
                    drawn = tab.build(board)
                    if isinstance(drawn, Live):
                        lives.append(drawn)
                    elif isinstance(drawn, ChatBox):
                        box = drawn
        _remember(board, page, lives)
        _speak(board, page, box)
    return page


def _remember(board: Board, page: gr.Blocks, lives: list[Live]) -> None:
    """What the controls hold is kept in the browser, and is there again when the page is opened anew; runs are found by their files."""
    ids = ["top.lang", *(id for id in board.parts if id in controls() and not controls()[id].secret and id != "top.lang")]
    ids += [id for id in board.parts if id.endswith((".output_dir", ".more")) and not id.startswith("section.")]
    kept = gr.BrowserState({}, storage_key="finery-board")
    parts = board.some(ids)
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gr.on([part.change for part in parts], None, parts, kept, js=f"(...held) => [{_as_object(ids)}]", **quiet)

    def restore(told: Mapping[str, Any] | None, request: gr.Request) -> dict[Any, Any]:
        known = told or {"top.model_path": str(demo_folder())}
        held = {"top.lang": preferred(request.headers.get("accept-language", "")), **known}
        updates = {part: _given(update) for part, update in board.switch_language(held["top.lang"]).items()}
        for id, value in held.items():
            if id in board.parts and value is not None:
                updates.setdefault(board.parts[id], {})["value"] = value
        for live in lives:
            updates.setdefault(board.parts[f"{live.tab}.job"], {}).update(_given(live.watch()))
        return {part: gr.update(**given) for part, given in updates.items()}

    every = list(dict.fromkeys([*board.speaking(), *parts, *(board.parts[f"{live.tab}.job"] for live in lives)]))
    for name in TABS:
        board.parts[f"tabs.{name}"].select(
            None, js=f"() => {{ window.tabsRestored && history.replaceState(history.state, '', '#{name}'); }}", **quiet
        )
    page.load(restore, [kept], every, **quiet).then(None, js=_OPEN_TAB, **quiet)


def _speak(board: Board, page: gr.Blocks, box: ChatBox | None) -> None:
    """The language that is chosen, or was chosen in this browser, is that of every part; at first it is the browser's own."""
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    lang = board.parts["top.lang"]
    lang.input(board.switch_language, [lang], board.speaking(), **quiet)
    if box is not None:
        lang.change(box.in_language, [lang, *box.inputs], box.named, **quiet)


def _given(update: Any) -> dict[str, Any]:
    return {key: value for key, value in (update or {}).items() if key != "__type__"}


def _as_object(ids: list[str]) -> str:
    """A JavaScript object of what the parts hold, in the order of `ids`."""
    return "{" + ", ".join(f"{id!r}: held[{number}]" for number, id in enumerate(ids)) + "}"
