"""Markdown for the terminal, cut into blocks: what is complete is printed for good, so that only the last block is ever drawn anew."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from rich.console import RenderableType
from rich.markdown import Markdown

_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable(["image", "reference"])
"""Tags, pictures and definitions of links are shown as they were written: nothing that a model says is to get lost."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What would steer a terminal."""


def harmless(text: str) -> str:
    """A text without characters that steer a terminal."""
    return _CONTROL.sub("", text)


def num_complete(text: str) -> int:
    """How many letters at the beginning of a text are blocks that what comes later cannot change."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    if len(starts) < 2:
        return 0
    lines = text.split("\n")[: starts[-1]]
    return sum(len(line) + 1 for line in lines)


def rendered(text: str) -> RenderableType:
    """Markdown as rich draws it; lines stay lines."""
    found = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    found.parsed = _PARSER.parse(harmless(text))
    for token in found.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return found
