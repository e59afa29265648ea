"""Two texts beside each other, as HTML: what only one of them has is marked."""

from __future__ import annotations

import html
import re
from difflib import SequenceMatcher

_PIECE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|\s+|[^\w\s]")
"""What is compared as one: a word, a gap, a sign; scripts without gaps by the letter."""
_MOST_PIECES = 3000
"""Longer texts are shown without marks: comparing takes time by the square of their length."""


def marked(one: str, other: str) -> tuple[str, str]:
    """Both texts, escaped."""
    pieces = _PIECE.findall(one), _PIECE.findall(other)
    if one == other or max(map(len, pieces)) > _MOST_PIECES:
        return html.escape(one), html.escape(other)
    told: tuple[list[str], list[str]] = ([], [])
    for kind, start, end, begin, stop in SequenceMatcher(None, *pieces, autojunk=False).get_opcodes():
        for side, text in enumerate(("".join(pieces[0][start:end]), "".join(pieces[1][begin:stop]))):
            shown, same = html.escape(text), kind == "equal" and not text.isspace()  # a gap alone does not part two marks
            told[side].append(shown if same or not text else f"<mark>{shown}</mark>")
    first, second = ("".join(side).replace("</mark><mark>", "") for side in told)
    return first, second
