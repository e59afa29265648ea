"""The board's page as it is being drawn: its parts by id, in the language of whoever looks, and what they hold."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from finery.errors import UserError
from finery.web.form import Control, controls
from finery.web.loaded import Loaded
from finery.web.roots import Roots
from finery.web.texts import FIRST, Texts, choices_of, texts


@dataclass
class Board:
    """Pages add their parts, drawn in one language."""

    roots: Roots
    language: str = FIRST
    is_demo: bool = False  # for public places: nothing is trained, and no path is taken
    demo_keys: Mapping[str, Any] = field(default_factory=dict)  # of the one model that such a page talks with
    upload_bytes: int = 256 << 20  # of one file that is sent
    parts: dict[str, Any] = field(default_factory=dict)
    loaded: Loaded = field(default_factory=Loaded)  # what the chat answers with, in all windows

    @property
    def texts(self) -> Texts:
        """What the page says."""
        return texts(self.language)

    # ------------------------------------------------------------------ drawing

    def add(self, id: str, part: Callable[..., Any], **given: Any) -> Any:
        """A part that is no control of `controls.yaml`: a button, a box; its texts come from the files."""
        said = self.texts.part(id)
        made = part(**{**said, **given}, elem_id=id.replace(".", "-"))
        self.parts[id] = made
        return made

    def control(self, id: str, **given: Any) -> Any:
        """One control, drawn as its options say."""
        control = controls()[id]
        made = _draw(control, {**self.texts.part(id), **given}, self.texts)
        self.parts[id] = made
        return made

    def row(self, *ids: str) -> None:
        """Controls beside each other; they wrap where the window is narrow."""
        with gr.Row():
            for id in ids:
                self.control(id)

    def section(self, tab: str, section: str) -> list[str]:
        """The ids of a section's controls."""
        return [control.id for control in controls().values() if (control.tab, control.section) == (tab, section)]

    @contextmanager
    def folded(self, tab: str, section: str, **given: Any) -> Iterator[None]:
        """A section that opens when asked."""
        id = f"{tab}.{section}"
        with gr.Accordion(self.texts.section(id), open=False, **given, elem_id=f"section-{tab}-{section}") as made:
            self.parts[f"section.{id}"] = made
            yield

    # ------------------------------------------------------------------ what parts hold

    def of(self, *tabs: str) -> list[str]:
        """The ids of all controls of some tabs that are drawn, in order."""
        return [control.id for control in controls().values() if control.tab in tabs and control.id in self.parts]

    def some(self, ids: Sequence[str]) -> list[Any]:
        """Parts by their ids."""
        return [self.parts[id] for id in ids]

    def on(self, triggers: Any, work: Callable[..., Any], ids: Sequence[str], outputs: Sequence[str], **given: Any) -> Any:
        """Call `work` with what the parts `ids` hold, as one dict by id; it returns a value for each of `outputs`, or a dict of some.

        What a user can mend is shown beside the page, and nothing else changes.
        """

        def called(*held: Any) -> Any:
            with _told():
                found = work(dict(zip(ids, held, strict=True)))
            if found == {}:  # which Gradio takes for a value
                return gr.skip()
            if isinstance(found, dict) and "__type__" not in found:  # which is a single update
                return {self.parts[id]: value for id, value in found.items()}
            return found

        given = {"api_visibility": "private", "show_progress": "hidden", **given}
        return gr.on(triggers, called, self.some(ids), self.some(outputs), **given)

    def stream(self, triggers: Any, work: Callable[..., Iterator[Any]], ids: Sequence[str], outputs: Sequence[str]) -> Any:
        """As `on`, of work that gives its results piece by piece."""

        def called(*held: Any) -> Iterator[Any]:
            with _told():
                yield from work(dict(zip(ids, held, strict=True)))

        return gr.on(triggers, called, self.some(ids), self.some(outputs), api_visibility="private", show_progress="hidden")


@contextmanager
def _told() -> Iterator[None]:
    """What a user can mend is shown beside the page, as text."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), duration=15, print_exception=False) from None


def _draw(control: Control, given: dict[str, Any], spoken: Texts) -> Any:
    shared = {"elem_id": control.id.replace(".", "-"), "interactive": True, "value": control.begins, **given}
    if control.kind == "slider":
        return gr.Slider(control.least or 0, control.most or 1, step=control.step, **shared)
    if control.kind == "switch":
        return gr.Checkbox(**shared)
    if control.kind == "choice":
        own = {
            "choices": choices_of(spoken, control.id, control.choices or ()),
            "multiselect": control.many,
            "allow_custom_value": control.free,
        }
        return gr.Dropdown(**{**own, **shared})
    return gr.Textbox(**{"type": "password" if control.secret else "text", "max_lines": 1, **shared})
