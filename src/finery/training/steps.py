"""One optimizer step, cut into micro-batches by a token budget."""

from collections.abc import Sequence

import numpy as np

from finery.data.rows.base import IGNORED, Row

Parts = list[list[Row]]
"""Micro-batches, or other groups of a step's rows."""
MOST_PADDING = 0.25
"""Padded rows share a micro-batch only while padding is at most this part of the longest: padded tokens cost as much as real ones."""


def cut(rows: Sequence[Row], budget: int, end_to_end: bool = False) -> Parts:
    """Micro-batches of at most `budget` tokens, padding counted unless rows lie end to end; a longer row stands alone.

    Rows are sorted by length, longest first. Which rows share a micro-batch does not change the gradient of the step, only its cost.
    """
    ordered = sorted(rows, key=lambda row: -len(row.ids))
    return _by_tokens(ordered, budget) if end_to_end else _by_padding(ordered, budget)


def deal(rows: Sequence[Row], number: int) -> Parts:
    """The rows in at most `number` groups of about as many tokens: longest first, each to the group that has least so far."""
    groups: Parts = [[] for _ in range(number)]
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        min(groups, key=tokens_of).append(row)
    return [group for group in groups if group]


def tokens_of(part: Sequence[Row]) -> int:
    """Without padding."""
    return sum(len(row.ids) for row in part)


def _by_tokens(rows: Sequence[Row], budget: int) -> Parts:
    """As few as the budget allows, and all about as long."""
    whole = tokens_of(rows)
    aim = whole / max(-(-whole // budget), 1)
    parts: Parts = []
    filled = 0
    for row in rows:
        if parts and filled + len(row.ids) <= budget and filled + len(row.ids) / 2 <= aim:
            parts[-1].append(row)
            filled += len(row.ids)
        else:
            parts.append([row])
            filled = len(row.ids)
    return parts


def _by_padding(rows: Sequence[Row], budget: int) -> Parts:
    parts: Parts = []
    longest = 0
    for row in rows:
        if parts and longest * (len(parts[-1]) + 1) <= budget and len(row.ids) >= (1 - MOST_PADDING) * longest:
            parts[-1].append(row)
        else:
            parts.append([row])
            longest = len(row.ids)
    return parts


def silent() -> Row:
    """A row that weighs nothing."""
    return Row(np.zeros(2, np.int32), np.full(2, IGNORED, np.int32))
