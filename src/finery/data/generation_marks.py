"""The `{% generation %}` marks that some chat templates set around what the model writes: used where they are right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")


def has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template sets marks at all."""
    return isinstance(tokenizer.chat_template, str) and bool(_MARK.search(tokenizer.chat_template))


def marked(tokenizer: PreTrainedTokenizerBase, called: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation, and for each whether it lies between marks; `called` are arguments of `apply_chat_template`."""
    found: Any = tokenizer.apply_chat_template(**called, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]


def right_ends(ids: Sequence[int], mask: Sequence[bool], prompts: Sequence[Sequence[int]], stops: frozenset[int]) -> list[int] | None:
    """Where the answers between marks end, if each begins where its prompt ends and holds one of `stops`; else nothing.

    What stands between the marks after the last of the stops, such as an empty line, is not the model's to write.
    """
    spans, at = [], 0
    for inside, run in groupby(mask):
        size = len(list(run))
        if inside:
            spans.append((at, at + size))
        at += size
    if len(spans) != len(prompts):
        return None
    ends = []
    for (start, end), prompt in zip(spans, prompts, strict=True):
        stop = next((place for place in range(end - 1, start - 1, -1) if ids[place] in stops), None)
        if list(ids[:start]) != list(prompt) or stop is None:
            return None
        ends.append(stop + 1)
    return ends
