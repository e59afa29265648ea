"""The board as a whole: what stands above, the tabs, and what every window finds when it opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default

from finery.web.board import Board
from finery.web.chat_box import CSS
from finery.web.form import controls
from finery.web.languages import COOKIE
from finery.web.live import Live
from finery.web.pages import chat, data, evaluate, export, runs, top, train

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

_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

_FIRST = """() => {
    const text = localStorage.getItem("finery-board") ?? "";
    window.held = JSON.parse(text || "{}");
    window.pending = text ? 1 : 0;
    return [text];
}"""
"""What this browser holds of an earlier visit."""
_KEEP = """value => {
    (window.held ??= {})[%s] = value;
    localStorage.setItem("finery-board", JSON.stringify(window.held));
    return [];
}"""
_SPEAK = """language => {
    document.cookie = `%s=${language}; path=/; max-age=31536000; SameSite=Lax`;
    location.href = `../${language}/${location.hash}`;
    return [];
}"""
_OPEN_TAB = """() => {
    if (%s !== 0) return [{__type__: "update"}];
    const tab = location.hash.slice(1), known = %s.includes(tab), end = Date.now() + 10000;
    const opened = () => {
        const there = !known || document.getElementById(`tab-${tab}-button`)?.getAttribute("aria-selected") === "true";
        if (there || Date.now() > end) window.tabsRestored = true;
        else setTimeout(opened, 50);
    };
    setTimeout(opened, 200);
    return [known ? {__type__: "update", selected: tab} : {__type__: "update"}];
}"""
"""When all is there that was there before, the tab is opened that was open: it is named in the address."""
_SEEN = """async () => {
    await new Promise(drawn => setTimeout(drawn));
    const open = %s.find(tab => document.getElementById(`tab-${tab}-button`)?.getAttribute("aria-selected") === "true");
    if (window.tabsRestored) history.replaceState(history.state, "", `#${open}`);
    return %s.map(tab => ({__type__: "update", active: tab === open}));
}"""
"""The address names the tab that is seen, and that one alone follows its job. Gradio may run this late, when yet another tab is open:
what is seen is looked up, not what was opened."""


def build(board: Board) -> gr.Blocks:
    """The page, ready to be served."""
    with gr.Blocks(title="Finery", analytics_enabled=False) as page:
        top.build(board, page)
        lives: list[Live] = []
        with gr.Tabs() as tabs:
            for name, tab in TABS.items():
                with gr.Tab(**board.texts.part(f"tabs.{name}"), id=name, elem_id=f"tab-{name}") as made:
                    board.parts[f"tabs.{name}"] = made
                    drawn = tab.build(board)
                    if isinstance(drawn, Live):
                        lives.append(drawn)
        _remember(board, page, tabs, lives)
        lang = board.parts["top.lang"]
        lang.input(None, [lang], None, js=_SPEAK % COOKIE, **_QUIET)
    return page


def _remember(board: Board, page: gr.Blocks, tabs: gr.Tabs, lives: list[Live]) -> None:
    """What the controls hold is kept in the browser, one by one as it changes, and is there again when the page is opened anew.

    For every part that an event takes or gives, Gradio searches the whole page: those who come for the first time wait for none.
    """
    ids = [id for id in board.parts if id in controls() and not controls()[id].secret and id != "top.lang"]
    ids += [id for id in board.parts if id.endswith((".output_dir", ".more")) and not id.startswith("section.")]
    for id in ids:
        board.parts[id].change(None, [board.parts[id]], None, js=_KEEP % json.dumps(id), **_QUIET)
    kept = gr.Textbox(visible="hidden", elem_id="kept")

    def restore(text: str) -> dict[Any, Any]:
        held = json.loads(text or "{}")
        return {board.parts[id]: gr.update(value=held[id]) for id in ids if held.get(id) is not None}

    begins = page.load(None, None, kept, js=_FIRST, **_QUIET)
    begins.then(None, None, tabs, js=_OPEN_TAB % ("window.pending", list(TABS)), **_QUIET)
    kept.change(restore, [kept], board.some(ids), **_QUIET).then(
        None, None, tabs, js=_OPEN_TAB % ("--window.pending", list(TABS)), **_QUIET
    )
    opened = [board.parts[f"tabs.{name}"].select for name in TABS]
    gr.on(opened, None, None, [live.timer for live in lives], js=_SEEN % (list(TABS), [live.tab for live in lives]), **_QUIET)
    jobs = board.some([f"{live.tab}.job" for live in lives])
    page.load(lambda: [live.watch() for live in lives], None, jobs, **_QUIET)
