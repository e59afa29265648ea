"""One optimizer step, cut into micro-batches by a token budget."""

from collections.abc import Sequence

from finery.data.rows.base import Row

MOST_PADDING = 0.25
"""Rows share a micro-batch only while padding is at most this part of the longest: padded tokens cost as much as real ones."""


def cut(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Micro-batches of at most `budget` tokens with padding, longest rows first; a longer row stands alone.

    Which rows share a micro-batch does not change the gradient of the step, only its cost.
    """
    parts: list[list[Row]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if parts and longest * (len(parts[-1]) + 1) <= budget and len(row.ids) >= (1 - MOST_PADDING) * longest:
            parts[-1].append(row)
        else:
            parts.append([row])
            longest = len(row.ids)
    return parts
