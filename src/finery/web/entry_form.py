"""An entry of dataset_info.json as a form: its fields are those of the registry's own models, and what they do not know is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import gradio as gr

from finery.data.formats import FORMATS
from finery.data.formats.base import PAIR, Columns, Tags
from finery.data.registry import DatasetEntry
from finery.web.board import Board
from finery.web.texts import Texts

FIRST = ("file_name", "hf_hub_url", "formatting", "ranking", "split", "subset")
"""What most entries say; the rest is folded away."""
NONE = "null"
"""Of a column: the records have none for this role, though the format has a usual one."""
_WIDTH = 210


@cache
def fields() -> dict[str, str | None]:
    """Every field, and under which key of the entry it stands, if it does not stand by itself."""
    own = {name: None for name in DatasetEntry.model_fields if name not in ("columns", "tags")}
    return {**own, **dict.fromkeys(Columns.model_fields, "columns"), **dict.fromkeys(Tags.model_fields, "tags")}


def ids() -> list[str]:
    """Of the parts that hold the fields."""
    return [f"entry.{name}" for name in fields()]


def draw(board: Board) -> None:
    """The parts, as they are for an entry that says nothing yet."""
    own = [name for name, group in fields().items() if group is None]
    fits = fitting(shown({}), [], board.texts)
    _draw_some(board, FIRST, fits)
    for section, names in (
        ("columns", [name for name, group in fields().items() if group == "columns"]),
        ("tags", [name for name, group in fields().items() if group == "tags"]),
        ("rest", [name for name in own if name not in FIRST]),
    ):
        id, given = f"section.data.{section}", {"open": section == "columns", **fits.get(f"section.data.{section}", {})}
        with gr.Accordion(board.texts.section(f"data.{section}"), **given, elem_id=f"section-data-{section}") as made:
            board.parts[id] = made
            _draw_some(board, names, fits)


def _draw_some(board: Board, names: Sequence[str], fits: Mapping[str, Mapping[str, Any]]) -> None:
    with gr.Row():  # which wraps, so that those that are not shown leave no gap
        for name in names:
            _draw_one(board, name, {"label": name, "min_width": _WIDTH, "interactive": True, **fits.get(f"entry.{name}", {})})


def _draw_one(board: Board, name: str, given: dict[str, Any]) -> None:
    id, group = f"entry.{name}", fields()[name]
    if group == "columns":
        board.add(id, gr.Dropdown, value="", allow_custom_value=True, **given)
    elif group == "tags":
        board.add(id, gr.Textbox, value="", max_lines=1, **given)
    elif name == "formatting":
        board.add(id, gr.Dropdown, choices=FORMATS.names(), value=_default(name), allow_custom_value=True, **given)
    elif isinstance(_default(name), bool):
        with gr.Column(min_width=_WIDTH):  # a box by itself is as narrow as can be
            board.add(id, gr.Checkbox, value=_default(name), **given)
    else:
        board.add(id, gr.Textbox, value="", placeholder=_default(name) or "", max_lines=1, **given)


def _default(name: str) -> Any:
    return DatasetEntry.model_fields[name].default


def shown(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the parts hold for an entry."""
    return {f"entry.{name}": _held(raw, name) for name in fields()}


def _held(raw: Mapping[str, Any], name: str) -> Any:
    group = fields()[name]
    place = raw if group is None else raw.get(group)
    told = isinstance(place, Mapping) and name in place
    value = place[name] if told else None  # type: ignore[index] -- it is one where it tells
    if group is None and isinstance(_default(name), bool):
        return str(value if told else _default(name)).lower() == "true"
    if name == "formatting" and not told:
        return _default(name)
    return (NONE if group == "columns" and told else "") if value is None else str(value)


def entry_of(held: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The entry that the parts describe: `raw` with what was changed, everything else as it stands there."""
    found: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for name, group in fields().items():
        value = held[f"entry.{name}"]
        if value == _held(raw, name) or (value is None and not _held(raw, name)):
            continue
        value = value.strip() if isinstance(value, str) else value
        place = found if group is None else found.get(group)
        if not isinstance(place, dict):
            place = found[str(group)] = {}
        place.pop(name) if name in place and value in ("", None) else None
        if value not in ("", None):
            place[name] = _typed(name, value)
    return {key: value for key, value in found.items() if value != {} or key in raw}


def _typed(name: str, value: Any) -> Any:
    """As the file has it."""
    if fields()[name] == "columns":
        return None if value == NONE else value
    return int(value) if name == "num_samples" and str(value).isdecimal() else value


def fitting(held: Mapping[str, Any], columns: Sequence[str], spoken: Texts) -> dict[str, dict[str, Any]]:
    """What changes where the parts hold this: roles that the format reads, what they are without a word, and the records' columns."""
    formatting, ranking = held["entry.formatting"], bool(held["entry.ranking"])
    if formatting not in FORMATS.names():
        return {}
    form = FORMATS[formatting](Columns(), Tags(), ranking)
    found: dict[str, dict[str, Any]] = {}
    for name in Columns.model_fields:
        usual = getattr(form.columns, name)
        first = spoken.say("data_column_usual", column=usual) if usual else spoken.say("data_column_none")
        choices = [(first, ""), *([(spoken.say("data_column_null"), NONE)] if usual else []), *((column, column) for column in columns)]
        reads = name in form.reads and (ranking or name not in PAIR)
        found[f"entry.{name}"] = {"choices": choices, "visible": reads or bool(held[f"entry.{name}"])}
    has_messages = "messages" in form.reads
    for name in Tags.model_fields:
        found[f"entry.{name}"] = {"placeholder": getattr(form.tags, name)}
    found["section.data.tags"] = {"visible": has_messages or any(held[f"entry.{name}"] for name in Tags.model_fields)}
    return found


def fitted() -> Iterator[str]:
    """The ids that `fitting` gives updates for."""
    yield from (f"entry.{name}" for name, group in fields().items() if group)
    yield "section.data.tags"
