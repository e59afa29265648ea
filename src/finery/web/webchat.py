"""The page of `finery webchat`: a chat box, and the language of its texts."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.themes import Default

from finery.talks.speaker import Speaker
from finery.web.chat_box import CSS, ChatBox, Session
from finery.web.texts import FIRST, LANGUAGES, preferred, texts

_HEAD = """
#head { align-items: center; }
#head h1 { font-size: 1.2rem; margin: 0; overflow-wrap: anywhere; }
#language { flex: 0 0 11rem; overflow: visible; }
"""


def look() -> dict[str, Any]:
    """Calm colours, and the reader's own fonts: nothing is fetched from elsewhere."""
    theme = Default(
        primary_hue="blue", neutral_hue="slate", radius_size="md", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return {"theme": theme, "css": CSS + _HEAD}


def build(speaker: Speaker) -> gr.Blocks:
    """The page of one model."""
    with gr.Blocks(title=f"{speaker.name} · Finery", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {speaker.name}", scale=4)
            choices = [(name, code) for code, name in LANGUAGES.items()]
            language = gr.Dropdown(choices, value=FIRST, elem_id="language", scale=0, min_width=176, **texts(FIRST).part("box.language"))
        box = ChatBox(lambda: speaker, speaker.options, speaker.chooses_thinking)

        def switch(code: str, session: Session, escapes: bool, tools: str) -> list[Any]:
            return [gr.Dropdown(**texts(code).part("box.language")), *box.in_language(code, session, escapes, tools)]

        def begin(request: gr.Request) -> Any:
            return gr.Dropdown(value=preferred(request.headers.get("accept-language", "")))

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        language.change(switch, [language, *box.inputs], [language, *box.named], **quiet)
        page.load(begin, None, language, **quiet)
    return page
