"""A talk as the messages of a chat page. Tags in what was said are text, whoever wrote them."""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

from markdown_it import MarkdownIt

from finery.data.dialects.base import dump
from finery.data.sample import Message
from finery.talks.answering import Answering
from finery.talks.talk import Talk
from finery.web.texts import texts

_BLOCKS = MarkdownIt("commonmark", {"html": False}).enable("table")
_DRAWS = MarkdownIt("commonmark", {"html": True}).enable("table")
_TAG = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|!(?=\[)")
"""Where HTML could begin, or a picture of another place; other `<` and `&` are left alone, which formulas need."""
_SHOWN = {"<": "&lt;", "&": "&amp;", "!": "&#33;"}
_CODE = re.compile(r"(?<![`\\])(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)


def as_text(text: str) -> str:
    """Markdown in which tags are shown and not drawn; within code they are shown anyway.

    What is code is not always plain: where a tag would be drawn after all, more is escaped than looks best.
    """
    if not _TAG.search(text):
        return text
    found = _outside_code(text, spans=True)
    if _draws(found):
        found = _outside_code(text, spans=False)
    return _escaped(text) if _draws(found) else found


def _draws(text: str) -> bool:
    """Whether a tag or a picture would be drawn."""
    tokens = _DRAWS.parse(text)
    every = [*tokens, *(child for token in tokens for child in token.children or ())]
    return any(token.type in ("html_block", "html_inline", "image") for token in every)


def _outside_code(text: str, spans: bool) -> str:
    """Escaped, but for blocks of code, and spans of code where those are looked for, each in its own paragraph."""
    lines = text.split("\n")
    until: dict[int, int] = {}  # where a part of the text ends, by where it begins
    code: set[int] = set()
    for token in _BLOCKS.parse(text):
        if token.map and token.type in ("fence", "code_block"):
            code.add(token.map[0])
        if token.map and token.type in ("fence", "code_block", "inline"):
            until[token.map[0]] = token.map[1]
    found, at = [], 0
    while at < len(lines):
        end = max(until.get(at, 0), at + 1)
        part = "\n".join(lines[at:end])
        found.append(part if at in code else _spans(part) if spans else _escaped(part))
        at = end
    return "\n".join(found)


def _spans(text: str) -> str:
    found, at = "", 0
    for span in _CODE.finditer(text):
        found += _escaped(text[at : span.start()]) + span[0]
        at = span.end()
    return found + _escaped(text[at:])


def _escaped(text: str) -> str:
    return _TAG.sub(lambda found: _SHOWN[found[0]], text)


def bubbles(talk: Talk, answering: Answering | None, language: str, escapes: bool) -> list[Any]:
    """All messages, and the answer that is on its way."""
    show = as_text if escapes else str
    found: list[Any] = []
    for message in talk.messages:
        if message.role in ("assistant", "function"):
            summary = texts(language).say("talk_past_thought")
            found.append({"role": "assistant", "content": _answer(message, summary, show)})
        else:
            before = f"**{texts(language).say('talk_result')}**\n\n" if message.role == "observation" else ""
            found.append({"role": "user", "content": before + show(message.content)})
    if answering is not None and answering.finish is None:
        found.append({"role": "assistant", "content": _coming(answering, language, show) or f"*{texts(language).say('talk_waiting')}*"})
    return found


def _coming(answering: Answering, language: str, show: Any) -> str:
    thinks = answering.thinks
    summary = texts(language).say("talk_thinking") if thinks else thought_for(answering, language)
    return _thought(answering.thought, summary, thinks) + show(answering.content)


def thought_for(answering: Answering, language: str) -> str:
    """`Thought for 12 tokens, 0.8 s`."""
    return texts(language).say("talk_thought", tokens=answering.num_thought_tokens, seconds=f"{answering.thought_seconds:.1f}")


def _answer(message: Message, summary: str, show: Any) -> str:
    thought = _thought(message.thought, summary, False)
    if message.role == "assistant":
        return thought + show(message.content)
    return thought + "\n\n".join(part for part in (show(message.before_calls), fenced(message.content)) if part)


def _thought(thought: str, summary: str, opened: bool) -> str:
    """Folded, and without Markdown: one line of HTML, in which nothing of the thought can mean something."""
    if not thought:
        return ""
    body = escape(thought.strip()).replace("\n", "<br>")
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary><div>{body}</div></details>\n\n"


def fenced(calls: str) -> str:
    """JSON as a block of code that nothing in it can end."""
    body = dump(json.loads(calls), 2)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", body)), default=0))
    return f"{fence}json\n{body}\n{fence}"
