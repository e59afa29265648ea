"""Options as widgets: ranges, kinds and help are those that the options declare."""

from __future__ import annotations

from typing import Any, get_args

import gradio as gr

from finery.options import OptionGroup
from finery.web.texts import texts


def limits(group: type[OptionGroup], name: str) -> tuple[float | None, float | None]:
    """The least and the greatest value that a key may have."""
    low: float | None = None
    high: float | None = None
    for fact in group.model_fields[name].metadata:
        for bound in ("ge", "gt"):
            low = getattr(fact, bound, low)
        for bound in ("le", "lt"):
            high = getattr(fact, bound, high)
    return low, high


def widget(group: OptionGroup, name: str, id: str, language: str) -> Any:
    """What a key is set with; its value is that of `group`."""
    field, value = type(group).model_fields[name], getattr(group, name)
    kinds = get_args(field.annotation) or (field.annotation,)
    words = field_words(type(group), name, language)
    if bool in kinds:
        return gr.Checkbox(value, elem_id=id, **words)
    if type(None) in kinds:  # a number's field cannot be empty
        return gr.Textbox("" if value is None else str(value), lines=1, max_lines=1, elem_id=id, **words)
    low, high = limits(type(group), name)
    whole = int in kinds
    if low is not None and high is not None and not whole:
        return gr.Slider(low, high, value, step=0.01, elem_id=id, buttons=[], **words)
    step, precision = (1, 0) if whole else (0.05, None)
    return gr.Number(value, minimum=low, step=step, precision=precision, elem_id=id, **words)


def field_words(group: type[OptionGroup], name: str, language: str) -> dict[str, Any]:
    """The label and help of a key; in the first language they are the key's own."""
    words = texts(language).part(f"settings.{name}")
    return words or {"label": name.replace("_", " ").capitalize(), "info": group.model_fields[name].description or ""}
