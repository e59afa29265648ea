"""What stands above all tabs: the language, the model, how it is tuned, and which checkpoints are taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from finery.hub import active_hub
from finery.models.adapters import ADAPTERS
from finery.models.demo_model import demo_folder
from finery.models.listed import listed_models
from finery.models.quantizers import QUANTIZERS
from finery.web.board import Board
from finery.web.named import CUSTOM, DEMO, HUBS, name_of, path_of
from finery.web.saves import checkpoints
from finery.web.texts import LANGUAGES
from finery.web.verdict import verdict

_BITS = {"bnb": ("8", "4"), "hqq": ("8", "6", "5", "4", "3", "2", "1"), "eetq": ("8",), "torchao": ("8", "4"), "quanto": ("8", "4", "2")}


def build(board: Board, page: gr.Blocks) -> None:
    """Draw it, at the head of a page."""
    with gr.Row(elem_id="head"):
        gr.Markdown("# Finery")
        board.add("top.demo_btn", gr.Button, size="sm", scale=0, min_width=180)
        board.add(
            "top.lang",
            gr.Dropdown,
            choices=[(name, code) for code, name in LANGUAGES.items()],
            value=board.language,
            scale=0,
            min_width=140,
        )
    with gr.Row():
        board.control("top.model_name", choices=[DEMO, *listed_models(), CUSTOM], value=DEMO, scale=2)
        board.control("top.model_path", value=str(demo_folder()), scale=2)
        board.control("top.hub_name", value=next(name for name, hub in HUBS.items() if hub == active_hub()))
    with gr.Row():
        board.control("top.finetuning_type")
        board.control("top.checkpoint_path", scale=2)
        with gr.Column(min_width=240):
            board.control("top.template", choices=_templates())
            board.add("top.verdict", gr.HTML)
    with gr.Accordion(board.texts.section("top.more"), open=False, elem_id="section-top-more") as more:
        board.parts["section.top.more"] = more
        board.row("top.quantization_bit", "top.quantization_method", "top.rope_scaling", "top.booster")
    _wire(board, page)


def _templates() -> list[str]:
    from finery.data.template import template_names

    return ["auto", *template_names()]


def _wire(board: Board, page: gr.Blocks) -> None:
    parts = board.parts
    model = ["top.model_name", "top.hub_name"]
    chosen = [*model, "top.model_path"]
    board.on([parts["top.model_name"].input], _choose_model, chosen, ["top.model_path", "top.template"])
    board.on([parts["top.hub_name"].input], _choose_hub, chosen, ["top.model_path", "top.template"])
    board.on(
        [parts["top.model_path"].change], _name_model, ["top.model_name", "top.model_path"], ["top.model_name"], trigger_mode="always_last"
    )
    seen = ["top.model_path", "top.template"]
    board.on(
        [page.load, parts["top.model_path"].change, parts["top.template"].change],
        lambda held: verdict(board.roots, held["top.model_path"], held["top.template"], board.texts),
        seen,
        ["top.verdict"],
        trigger_mode="always_last",
    )
    known = ["top.model_name", "top.model_path", "top.finetuning_type", "top.checkpoint_path"]
    listed = ["top.checkpoint_path"]
    board.on([parts["top.checkpoint_path"].focus], lambda held: _list_checkpoints(board, held), known, listed)
    events = [parts["top.model_path"].change, parts["top.finetuning_type"].change]
    board.on(events, lambda held: _drop_checkpoints(board, held), known, listed)
    board.on(
        [parts["top.finetuning_type"].change, parts["top.quantization_method"].change],
        _choose_bits,
        ["top.finetuning_type", "top.quantization_method", "top.quantization_bit"],
        ["top.quantization_bit"],
    )


def _choose_model(held: Mapping[str, Any]) -> tuple[Any, Any]:
    """Its path and its template: the tokenizer's own, and the list's where there is none, which is what `auto` means."""
    name = held["top.model_name"]
    return (gr.skip() if name in (CUSTOM, None, "") else path_of(name, held["top.hub_name"])), "auto"


def _choose_hub(held: Mapping[str, Any]) -> tuple[Any, Any]:
    """The same model elsewhere. A path that was typed stays: Gradio tells of a choice also when a list is only left."""
    named = name_of(held["top.model_path"], held["top.model_name"]) == held["top.model_name"]
    return _choose_model(held) if named else (gr.skip(), gr.skip())


def _name_model(held: Mapping[str, Any]) -> Any:
    """A path that is typed is no longer the model that was named above it."""
    name = name_of(held["top.model_path"], held["top.model_name"])
    return gr.skip() if name == held["top.model_name"] else name


def _list_checkpoints(board: Board, held: Mapping[str, Any]) -> Any:
    takes_many = ADAPTERS[held["top.finetuning_type"]].takes_adapters
    there = checkpoints(board.roots, held, takes_many)
    chosen = _fitting(held, there)
    return gr.update(choices=there, value=chosen if takes_many else chosen[:1], max_choices=None if takes_many else 1)


def _drop_checkpoints(board: Board, held: Mapping[str, Any]) -> Any:
    """Those of another model; where none is dropped nothing is told, since every answer lets Gradio tell of changes anew, for ever."""
    if not held["top.checkpoint_path"]:
        return gr.skip()
    kept = _fitting(held, checkpoints(board.roots, held, ADAPTERS[held["top.finetuning_type"]].takes_adapters))
    return gr.skip() if kept == held["top.checkpoint_path"] else gr.update(value=kept)


def _fitting(held: Mapping[str, Any], there: list[str]) -> list[str]:
    return [one for one in held["top.checkpoint_path"] or [] if one in there]


def _choose_bits(held: Mapping[str, Any]) -> Any:
    """Only frozen weights can be held in few bits, and each method has its own."""
    if not ADAPTERS[held["top.finetuning_type"]].frozen_base:
        return gr.update(value="none", interactive=False)
    bits = ["none", *_BITS.get(held["top.quantization_method"], ("8", "4"))]
    kept = held["top.quantization_bit"] if held["top.quantization_bit"] in bits else "none"
    return gr.update(choices=bits, value=kept, interactive=held["top.quantization_method"] in QUANTIZERS.names())
