"""Data: the sets of a folder, an entry of its dataset_info.json as a form, files sent to it, and what a check finds in them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from finery.data.files import PACKED, endings
from finery.data.registry import FILE, find_entry
from finery.errors import UserError
from finery.web import entry_form, samples
from finery.web.board import Board
from finery.web.catalogue import DataFolder, data_folder, listed, loose_files
from finery.web.inspecting import count, inspect
from finery.web.texts import Texts, texts
from finery.web.uploads import Exists, free_name, safe_name, sweep, take

_CHEAP_BYTES = 32 << 20
"""The rows of a set are counted where its files are no larger."""
_ROW_CLICKED = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-set], button[data-file]');
  if (button) trigger('click', {set: button.dataset.set ?? '', file: button.dataset.file ?? ''});
});"""
FORM = ["entry.name", *entry_form.ids()]
SEEN = ["data.findings", "data.samples"]
_ASKED = ["data.exists_row", "data.exists_text", "data.sent"]
_ALL = [*FORM, "section.data.tags", *SEEN, "data.read", "data.title", "data.remove_row"]


def build(board: Board) -> None:
    """Draw it."""
    with gr.Row():
        board.add("data.dataset_dir", gr.Textbox, value="data", max_lines=1, scale=3)
        board.add("data.list_btn", gr.Button, size="sm", min_width=100)
        board.add("data.new_btn", gr.Button, size="sm", min_width=100)
    board.add("data.notice", gr.HTML)
    board.add("data.sets", gr.HTML, js_on_load=_ROW_CLICKED)
    types = [*endings(), *PACKED]
    board.add("data.upload", gr.File, file_types=types, height=130)
    with gr.Row(visible=False) as asked:
        board.add("data.exists_text", gr.HTML)
        board.add("data.replace_btn", gr.Button, variant="stop", size="sm")
        board.add("data.both_btn", gr.Button, size="sm")
        board.add("data.keep_btn", gr.Button, size="sm")
    board.parts["data.exists_row"] = asked
    board.add("data.title", gr.HTML, value=f"<h3>{texts('en').say('data_entry_new')}</h3>")
    with gr.Column(elem_id="data-entry"):
        board.add("entry.name", gr.Textbox, value="", max_lines=1)
        entry_form.draw(board)
    with gr.Row():
        board.add("data.look_btn", gr.Button)
        board.add("data.save_btn", gr.Button, variant="primary")
        board.add("data.remove_btn", gr.Button)
    with gr.Row(visible=False) as sure:
        board.add("data.sure_btn", gr.Button, variant="stop", size="sm")
        board.add("data.cancel_btn", gr.Button, size="sm")
    board.parts["data.remove_row"] = sure
    board.add("data.findings", gr.HTML)
    board.add("data.samples", gr.HTML)
    for name in ("read", "sent", "clicked"):  # the entry as it was read; a file that waits for an answer; what was chosen in the list
        board.parts[f"data.{name}"] = gr.State()
    _wire(board)


def _wire(board: Board) -> None:
    parts, where = board.parts, ["data.dataset_dir"]
    sets = ["data.notice", "data.sets"]

    def on(trigger: Any, work: Any, ids: list[str], outputs: list[str], **given: Any) -> Any:
        return board.on(trigger, lambda held: work(board, held), [*where, *ids], outputs, **given)

    opened = [parts["data.list_btn"].click, parts["data.dataset_dir"].submit]
    on(opened + ([parts["tabs.data"].select] if "tabs.data" in parts else []), show_sets, [], sets)
    gr.on(parts["data.sets"].click, _clicked, None, parts["data.clicked"], api_visibility="private", show_progress="hidden")
    on(parts["data.clicked"].change, choose, ["data.clicked"], _ALL, show_progress="minimal")
    on(parts["data.new_btn"].click, lambda board, held: filled(board, "", {}, None), [], _ALL)
    on(parts["data.look_btn"].click, look, [*FORM, "data.read"], _ALL, show_progress="minimal")
    on([parts["entry.formatting"].input, parts["entry.ranking"].input], _fit, [*FORM, "data.read"], list(entry_form.fitted()))
    on(parts["data.save_btn"].click, save, [*FORM, "data.read"], [*_ALL, *sets], show_progress="minimal")
    on(parts["data.remove_btn"].click, _ask_to_remove, ["data.read"], ["data.remove_row"])
    on(parts["data.sure_btn"].click, remove, ["data.read"], [*_ALL, *sets])
    board.on(parts["data.cancel_btn"].click, lambda held: gr.update(visible=False), [], ["data.remove_row"])
    after = [*_ALL, *sets, *_ASKED]
    on(parts["data.upload"].upload, receive, ["data.upload"], [*after, "data.upload"], show_progress="minimal")
    for name, how in (("replace_btn", "replace"), ("both_btn", "both")):
        work = lambda board, held, how=how: answer(board, held, how)  # noqa: E731 -- one for each button
        on(parts[f"data.{name}"].click, work, ["data.sent"], after, show_progress="minimal")
    on(parts["data.keep_btn"].click, _decline, ["data.sent"], _ASKED)


def _clicked(event: gr.EventData) -> tuple[str, str, float]:
    """A set or a file of the list, and when: the same may be chosen again."""
    return str(event.set), str(event.file), time.monotonic()  # type: ignore[attr-defined] -- what the script above sends


# ---------------------------------------------------------------------- the list


def show_sets(board: Board, held: Mapping[str, Any]) -> dict[str, Any]:
    """The list of the folder's sets, or why there is none."""
    spoken = board.texts
    folder = data_folder(board.roots, held["data.dataset_dir"])
    try:
        sets = list(listed(folder))
    except UserError as error:  # a broken file is not written over, but others may be sent beside it
        return {"data.notice": f'<div class="warning">{samples.text(error)}</div>', "data.sets": ""}
    cheap = {one.name: one.files for one in sets if one.files and sum(file.stat().st_size for file in one.files) <= _CHEAP_BYTES}
    notice = f'<p class="packaged">{samples.text(spoken.say("data_packaged", folder=folder.home.name))}</p>' if folder.is_packaged else ""
    loose = [] if folder.is_packaged else loose_files(folder, sets)
    return {"data.notice": notice, "data.sets": samples.table(sets, count(folder.path, cheap), loose, spoken)}


def choose(board: Board, held: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the form with what was chosen in the list: an entry, or what a file looks like."""
    if not held["data.clicked"]:
        return {}
    name, file, _ = held["data.clicked"]
    folder = data_folder(board.roots, held["data.dataset_dir"])
    if file:
        if folder.is_packaged or file not in loose_files(folder, list(listed(folder))):
            raise UserError(f"there is no file {file!r} in {folder.home} that no entry names")
        return propose(board, held, folder, file)
    entries = folder.entries()
    if name not in entries:
        raise UserError(f"{FILE} has no data set {name!r} any more")
    raw = entries[name] if isinstance(entries[name], dict) else {}
    found = None
    try:
        entry = find_entry(name, entries)
        if not (entry.hub or entry.cloud_file_name):  # what lies elsewhere is fetched when it is asked for
            folder.files(name, entry)
            found = inspect(folder.path, name, raw)
    except UserError as error:
        found = _nothing(str(error))
    return filled(board, name, raw, found, read={"name": name, "raw": entries[name]})


# ---------------------------------------------------------------------- the form


def filled(board: Board, name: str, raw: Mapping[str, Any], found: Mapping[str, Any] | None, read: Any = None) -> dict[str, Any]:
    """The form with an entry, and what was found in its records."""
    spoken = board.texts
    values = entry_form.shown(raw)
    columns = list(found["columns"]) if found else []
    updates = entry_form.fitting(values, columns, spoken)
    for id, value in values.items():
        updates.setdefault(id, {})["value"] = value
    title = spoken.say("data_entry_title", entry=read["name"]) if read else spoken.say("data_entry_new")
    return {
        **{id: gr.update(**update) for id, update in updates.items()},
        "entry.name": name,
        "data.title": f"<h3>{samples.text(title)}</h3>",
        "data.read": {"read": read, "columns": columns, "raw": dict(raw)},
        "data.remove_row": gr.update(visible=False),
        **_seen(found, spoken),
    }


def _seen(found: Mapping[str, Any] | None, spoken: Texts) -> dict[str, str]:
    if found is None:
        return dict.fromkeys(SEEN, "")
    return {"data.findings": samples.findings(found, spoken), "data.samples": samples.samples(found, spoken)}


def _nothing(complaint: str) -> dict[str, Any]:
    return {"columns": [], "samples": [], "findings": [], "checked": [], "complaint": complaint}


def _fit(board: Board, held: Mapping[str, Any]) -> dict[str, Any]:
    columns = (held["data.read"] or {}).get("columns", [])
    found = entry_form.fitting(held, columns, board.texts)
    return {id: gr.update(**update) for id, update in found.items()}


def _described(held: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """The name and the entry that the form holds, and the one that it was read from."""
    state = held["data.read"] or {"read": None, "raw": {}}
    return (held["entry.name"] or "").strip(), entry_form.entry_of(held, state["raw"]), state["read"]


def look(board: Board, held: Mapping[str, Any]) -> dict[str, Any]:
    """Check what the form holds, saved or not, and show its first samples."""
    name, raw, _ = _described(held)
    folder = data_folder(board.roots, held["data.dataset_dir"])
    name = name or "data"
    entry = find_entry(name, {name: raw})
    folder.look_at(name, raw)
    if board.is_demo and (entry.hub or entry.cloud_file_name):
        raise UserError("this page is a demonstration: it fetches nothing")
    folder.files(name, entry)
    found = inspect(folder.path, name, raw)
    state = {**(held["data.read"] or {"read": None, "raw": {}}), "columns": list(found["columns"])}
    fits = entry_form.fitting(held, list(found["columns"]), board.texts)
    return {**{id: gr.update(**update) for id, update in fits.items()}, "data.read": state, **_seen(found, board.texts)}


def save(board: Board, held: Mapping[str, Any]) -> dict[str, Any]:
    """Write the entry: a new one, one that was changed, or one under another name."""
    folder = _writable(board, held)
    name, raw, read = _described(held)
    folder.put(name, raw, (read["name"], read["raw"]) if read else None)
    gr.Info(board.texts.say("data_entry_saved", entry=samples.text(name), path=samples.text(folder.home / FILE)))
    again = {**held, "data.clicked": (name, "", 0.0)}
    return {**choose(board, again), **show_sets(board, held)}


def _ask_to_remove(board: Board, held: Mapping[str, Any]) -> Any:
    _read(held)
    return gr.update(visible=True)


def _read(held: Mapping[str, Any]) -> tuple[str, Any]:
    read = (held["data.read"] or {}).get("read")
    if read is None:
        raise UserError("no data set is chosen: choose one in the list")
    return read["name"], read["raw"]


def remove(board: Board, held: Mapping[str, Any]) -> dict[str, Any]:
    """Take the entry out of the file, once that was asked again."""
    folder = _writable(board, held)
    folder.remove(_read(held))
    return {**filled(board, "", {}, None), **show_sets(board, held)}


def _writable(board: Board, held: Mapping[str, Any]) -> DataFolder:
    if board.is_demo:
        raise UserError("this page is a demonstration: nothing is written")
    return data_folder(board.roots, held["data.dataset_dir"])


# ---------------------------------------------------------------------- files that are sent


def receive(board: Board, held: Mapping[str, Any]) -> dict[str, Any]:
    """A file has come: it goes into the folder, unless one of its name is there."""
    sent = Path(held["data.upload"])
    if not sent.resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise UserError("this is no file that was sent")
    try:
        folder = _writable(board, held)
        name = safe_name(sent.name)
        if sent.stat().st_size > board.upload_bytes:
            raise UserError(f"{name} is larger than {board.upload_bytes >> 20} MB; copy it into the folder, and it appears in the list")
        take(folder, sent, name)
    except Exists as error:
        asked = {"data.exists_row": gr.update(visible=True), "data.exists_text": f"<p>{samples.text(error)}</p>", "data.sent": str(sent)}
        return {**asked, "data.upload": None}
    except BaseException:
        sent.unlink(missing_ok=True)
        raise
    finally:
        sweep()
    return {**_after(board, held, name), "data.upload": None}


def answer(board: Board, held: Mapping[str, Any], how: str) -> dict[str, Any]:
    """What is to become of a file whose name another one has."""
    if not held["data.sent"] or not (sent := Path(held["data.sent"])).is_file():
        raise UserError("the file that was sent is not here any more; send it again")
    folder = _writable(board, held)
    name = safe_name(sent.name)
    take(folder, sent, name := name if how == "replace" else free_name(folder.home, name), replaces=how == "replace")
    return _after(board, held, name)


def _decline(board: Board, held: Mapping[str, Any]) -> dict[str, Any]:
    if held["data.sent"]:
        Path(held["data.sent"]).unlink(missing_ok=True)
    return _answered()


def _answered() -> dict[str, Any]:
    return {"data.exists_row": gr.update(visible=False), "data.exists_text": "", "data.sent": None}


def _after(board: Board, held: Mapping[str, Any], name: str) -> dict[str, Any]:
    folder = data_folder(board.roots, held["data.dataset_dir"])
    gr.Info(board.texts.say("data_file_saved", path=samples.text(folder.home / name)))
    return {**propose(board, held, folder, name), **show_sets(board, held), **_answered()}


def propose(board: Board, held: Mapping[str, Any], folder: DataFolder, file: str) -> dict[str, Any]:
    """An entry for a file, as its records look; the form waits to be saved."""
    board.roots.path(str(folder.home / file), "file_name")
    found = inspect(folder.home, file, None)
    try:
        entries = folder.entries()
    except UserError as error:
        entries, found = {}, {**found, "complaint": str(error)}
    stem = file.partition(".")[0]
    name = next(free for number in range(1, 10_000) if (free := stem if number == 1 else f"{stem}-{number}") not in entries)
    return filled(board, name, found["entry"] or {"file_name": file}, found)
