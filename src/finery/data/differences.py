"""The first place where two renderings of a conversation part, with the text around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finery.data.jinja import FAULTS, num_shared
from finery.data.sample import Message
from finery.data.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AROUND = 3
"""So many tokens are shown on each side of a difference."""


def difference(tokenizer: PreTrainedTokenizerBase, ours: list[int], theirs: list[int], here: str = "here", there: str = "there") -> str:
    """The first token in which two lists differ, with the text around it."""
    place = num_shared(ours, theirs)

    def around(ids: list[int]) -> str:
        token = tokenizer.decode(ids[place : place + 1]) if place < len(ids) else "the end"
        return f"{token!r} (in {tokenizer.decode(ids[max(place - _AROUND, 0) : place + _AROUND + 1])!r})"

    return f"{here} token {place} is {around(ours)}, {there} {around(theirs)}"


def squeezed(text: str) -> str:
    """Without white space, which templates trim and some tokenizers swallow."""
    return "".join(text.split())


PROBE = (Message("user", "What is one and one?"), Message("assistant", "Two."), Message("user", "And two and two?"))


def first_difference(template: Template, tokenizer: PreTrainedTokenizerBase, jinja: str) -> str:
    """How a template's prompt differs from what `jinja` writes, tokenised whole; empty where it does not."""
    messages = [{"role": message.role, "content": message.content} for message in PROBE]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=True)
    except FAULTS as error:
        return f"it cannot write a plain conversation ({error})"
    theirs = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    ours = template.prompt_ids(list(PROBE))
    return "" if ours == theirs else difference(tokenizer, ours, list(theirs))  # type: ignore[arg-type]
