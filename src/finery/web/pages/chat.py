"""Chat: load what was tuned, talk to it, and ask it and its base the same question."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

from finery.data.sample import Message
from finery.errors import UserError
from finery.talks.options import TalkOptions
from finery.talks.speaker import Speaker
from finery.talks.talk import Talk
from finery.web.board import Board
from finery.web.chat_box import ChatBox
from finery.web.keys_panel import KeysPanel
from finery.web.loaded import Loaded
from finery.web.source import Source
from finery.web.starting import gathered
from finery.web.texts import Texts

_MOST_TOKENS = 256
"""Of an answer that stands beside another."""


def build(board: Board) -> ChatBox:
    """Draw it."""
    loaded = board.loaded
    with gr.Row():
        board.control("infer.infer_backend")
        board.control("infer.infer_dtype")
        with gr.Column(min_width=240):
            board.add("chat.load_btn", gr.Button, variant="primary")
            board.add("chat.unload_btn", gr.Button)
    source = Source(board, "chat")
    KeysPanel(board, "infer")
    board.add("chat.info_box", gr.HTML)
    box = ChatBox(lambda: loaded.speaker, TalkOptions.model_validate({}), prefix="chat-", language=board.language)
    with board.folded("chat", "both"):
        with gr.Row():
            board.add("chat.both_question", gr.Textbox, scale=5, lines=1, max_lines=5)
            board.add("chat.both_btn", gr.Button, scale=0, min_width=140)
        with gr.Row():
            board.add("chat.base_answer", gr.HTML, min_width=280)
            board.add("chat.tuned_answer", gr.HTML, min_width=280)
    _wire(board, loaded, source)
    return box


def _wire(board: Board, loaded: Loaded, source: Source) -> None:
    parts = board.parts
    ids = [*board.of("top", "infer"), "infer.more", "chat.newest"]
    shown = ["chat.info_box"]
    board.on(parts["chat.load_btn"].click, lambda held: _load(board, loaded, source.taken(held)), ids, shown, show_progress="full")
    board.on(parts["chat.unload_btn"].click, lambda held: _unload(board, loaded), [], shown)
    seen = parts["tabs.chat"].select
    board.on(seen, lambda held: told(loaded, board.texts), [], ["chat.info_box"])
    board.stream(
        [parts["chat.both_btn"].click, parts["chat.both_question"].submit],
        lambda held: ask_both(loaded, held["chat.both_question"] or "", board.texts),
        ["chat.both_question"],
        ["chat.base_answer", "chat.tuned_answer"],
    )


def _load(board: Board, loaded: Loaded, held: Mapping[str, Any]) -> str:
    if not board.is_demo:
        loaded.load(gathered(board, held, "infer", {}))
    elif loaded.keys is None:
        loaded.load(board.demo_keys)
    return told(loaded, board.texts)


def _unload(board: Board, loaded: Loaded) -> str:
    if not board.is_demo:
        loaded.unload()
    return told(loaded, board.texts)


def told(loaded: Loaded, spoken: Texts) -> str:
    """What is loaded, in words: the same in all windows."""
    if loaded.keys is None:
        return f"<p>{html.escape(spoken.say('nothing_loaded'))}</p>"
    adapters = loaded.keys.get("adapter_name_or_path") or []
    name = str(loaded.keys["model_name_or_path"]).rstrip("/").rpartition("/")[2]
    return f"<p>{html.escape(spoken.say('loaded', model=' + '.join([name, *adapters])))}</p>"


def ask_both(loaded: Loaded, question: str, spoken: Texts) -> Iterator[tuple[str, str]]:
    """The same question to the base and to what was tuned, likeliest tokens alone; both answers as they come."""
    if not question.strip():
        raise UserError(spoken.say("no_question"))
    if loaded.speaker is None:
        raise UserError(spoken.say("nothing_loaded"))
    yield _card(spoken.say("loading_base"), ""), ""
    speakers = [loaded.load_base() or loaded.speaker, loaded.speaker]
    answers = ["", ""]
    titles = [spoken.say("base_model"), spoken.say("tuned_model")]
    for number, speaker in enumerate(speakers):
        for text in _answer(speaker, question.strip()):
            answers[number] = text
            yield _card(titles[0], answers[0]), _card(titles[1], answers[1])


def _answer(speaker: Speaker, question: str) -> Iterator[str]:
    talk = Talk(messages=[Message("user", question)])
    options = speaker.options.changed(do_sample=False, max_new_tokens=min(_MOST_TOKENS, speaker.options.max_new_tokens))
    answering = speaker.begin(talk, options)
    for _ in answering:
        yield answering.thought + answering.content


def _card(title: str, text: str) -> str:
    return f'<article class="row"><h4>{html.escape(title)}</h4><pre>{html.escape(text)}</pre></article>'
