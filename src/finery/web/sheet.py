"""Tables as HTML, which the page's own style draws; what is wider than the window moves within it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def sheet(caption: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Everything in it is text."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in headers)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="sheet" tabindex="0"><table>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
