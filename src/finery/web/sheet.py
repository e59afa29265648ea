"""Tables as HTML, which the page's own style draws; what is wider than the window moves within it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def sheet(headers: Sequence[str], rows: Sequence[Sequence[Any]], looks: Sequence[str] = (), caption: str = "") -> str:
    """Everything in it is text. With `looks`, a class of the style for each row, the first cell of a row is its head."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in headers)
    if looks:
        body = "".join(f'<tr class="{look}">{_head(row[0])}{_cells(row[1:])}</tr>' for look, row in zip(looks, rows, strict=True))
    else:
        body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="sheet" tabindex="0"><table>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(cell: Any) -> str:
    return f'<th scope="row">{html.escape(str(cell))}</th>'


def _cells(row: Sequence[Any]) -> str:
    return "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
