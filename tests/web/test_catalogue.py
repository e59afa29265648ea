"""Entries of dataset_info.json: a form of the registry's own fields, written one at a time, none of which leads outside."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from data_page import QA, Held, chosen, held_of, records, registry
from finery.data.formats import FORMATS
from finery.data.registry import FILE
from finery.errors import UserError
from finery.web import entry_form
from finery.web.board import Board
from finery.web.catalogue import data_folder, listed
from finery.web.pages import data as page
from finery.web.texts import LANGUAGES, texts

EN = texts("en")

# ------------------------------------------------------------------ the form


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_field_of_the_registry_is_in_the_form_and_explained(drawn: Board, language: str) -> None:
    models = {"columns", "tags"}
    told = texts(language).told["entry"]
    assert {id.removeprefix("entry.") for id in page.FORM} == told.keys() and not models & told.keys()
    assert set(page.FORM) <= drawn.parts.keys()
    assert all(entry["info"] for entry in told.values())
    assert [value for _, value in drawn.parts["entry.formatting"].choices] == list(FORMATS.names())


RAWS: list[Any] = [
    {},
    {"file_name": "x.json", "sha1": "0a", "comment": {"by": ["me"]}},
    {"file_name": " x.json", "columns": {"prompt": "q", "query": None, "response": "null"}, "num_samples": 5, "ranking": True},
    {"hf_hub_url": "a/b", "ms_hub_url": None, "formatting": "sharegpt", "split": "train", "tags": {"role_tag": "r"}, "columns": {}},
    {"file_name": "x", "ranking": "yes", "columns": ["odd"], "tags": None, "formatting": "unheard of", "num_samples": "many"},
]


@pytest.mark.parametrize("raw", RAWS)
def test_what_is_not_touched_stays_as_it_is(raw: Any) -> None:
    assert entry_form.entry_of(entry_form.shown(raw), raw) == raw
    changed = entry_form.entry_of({**entry_form.shown(raw), "entry.subset": " sub "}, raw)
    assert changed == {**raw, "subset": "sub"}
    assert list(changed)[: len(raw)] == list(raw)


def test_columns_say_none_and_nothing() -> None:
    raw = {"file_name": "x.json", "columns": {"prompt": "q"}}
    held = {**entry_form.shown(raw), "entry.prompt": "", "entry.query": "null", "entry.num_samples": "7", "entry.user_tag": "Q"}
    assert entry_form.entry_of(held, raw) == {
        "file_name": "x.json",
        "columns": {"query": None},
        "num_samples": 7,
        "tags": {"user_tag": "Q"},
    }


@pytest.mark.parametrize("name", FORMATS.names())
@pytest.mark.parametrize("ranking", [False, True])
def test_a_format_shows_the_roles_that_it_reads(name: str, ranking: bool) -> None:
    held = {**entry_form.shown({}), "entry.formatting": name, "entry.ranking": ranking}
    found = entry_form.fitting(held, ["mine"], EN)
    seen = {id.removeprefix("entry.") for id, update in found.items() if update.get("visible") and id.startswith("entry.")}
    assert seen == set(FORMATS[name].reads) - (set() if ranking else {"chosen", "rejected"})
    assert ("mine", "mine") in found["entry.system"]["choices"]
    assert found.keys() == set(entry_form.fitted())


# ------------------------------------------------------------------ the file of entries


def test_an_entry_is_added_changed_renamed_and_removed(board: Board, home: Path) -> None:
    others = {"first": {"file_name": "a.json", "file_sha1": "0", "columns": {"prompt": "ü"}}, "last": {"hf_hub_url": "a/b"}}
    path = registry(home, others, indent=4)
    folder = data_folder(board.roots, "data")
    folder.put("new", {"file_name": "n.json"})
    folder.put("newer", {"file_name": "n.json", "split": "test"}, ("new", {"file_name": "n.json"}))
    folder.put("second", {"hf_hub_url": "c/d"}, ("last", {"hf_hub_url": "a/b"}))
    now = json.loads(path.read_text(encoding="utf-8"))
    assert list(now.items()) == [
        ("first", others["first"]),
        ("second", {"hf_hub_url": "c/d"}),
        ("newer", {"file_name": "n.json", "split": "test"}),
    ]
    assert '\n    "first": {\n        "file_name"' in path.read_text(encoding="utf-8")
    assert "ü" in path.read_text(encoding="utf-8")
    folder.remove(("second", {"hf_hub_url": "c/d"}))
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["first", "newer"]


BROKEN = ['{"a": {"file_name": "x.json"},}', "", "[1]", '{"a": {"file_name": "x"}, "a": {"file_name": "y"}}', '{"a": {"b": "\\ud800"}}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_would_lose_something_is_not_written_over(board: Board, home: Path, text: str) -> None:
    path = registry(home, text)
    with pytest.raises(UserError):
        data_folder(board.roots, "data").put("new", {"file_name": "n.json"})
    assert path.read_text(encoding="utf-8") == text
    assert [one.name for one in path.parent.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("name", "raw", "why"),
    [
        ("a", {"file_name": "n.json"}, "already"),
        ("x,y", {"file_name": "n.json"}, "without commas"),
        ("", {"file_name": "n.json"}, "without commas"),
        ("x\n", {"file_name": "n.json"}, "without commas"),
        ("new", {}, "names no file"),
        ("new", {"file_name": "n.json", "formating": "alpaca"}, "did you mean"),
        ("new", {"file_name": "n.json", "formatting": "alpca"}, "alpaca"),
        ("new", {"file_name": "n.json", "num_samples": 0}, "num_samples"),
        ("new", {"script_url": "x.py"}, "does not run"),
    ],
)
def test_an_entry_that_nothing_could_read_is_refused(board: Board, home: Path, name: str, raw: Held, why: str) -> None:
    path = registry(home, {"a": {"file_name": "a.json"}})
    before = path.read_bytes()
    with pytest.raises(UserError, match=why):
        data_folder(board.roots, "data").put(name, raw)
    assert path.read_bytes() == before


def test_two_windows_do_not_lose_each_others_entries(board: Board, home: Path) -> None:
    path = registry(home, {"mine": {"file_name": "a.json"}})

    def add(number: int) -> None:
        for count_ in range(8):
            data_folder(board.roots, "data").put(f"set{number}-{count_}", {"file_name": f"{number}.json"})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 33


def test_an_entry_that_somebody_else_has_changed_is_not_written_over(board: Board, home: Path) -> None:
    path = registry(home, {"mine": {"hf_hub_url": "a/b"}})
    one, other = chosen(board, "mine"), chosen(board, "mine")
    page.save(board, {**one, "entry.split": "train[:50%]"})
    for work, held in ((page.save, {**other, "entry.subset": "x"}), (page.remove, other)):
        with pytest.raises(UserError, match="changed by somebody else"):
            work(board, held)
    page.remove(board, chosen(board, "mine"))
    with pytest.raises(UserError, match="any more"):
        page.save(board, {**other, "entry.subset": "x"})
    assert json.loads(path.read_text(encoding="utf-8")) == {}


# ------------------------------------------------------------------ places outside

OUTSIDE: list[Held] = [
    {"file_name": "../../secret.jsonl"},
    {"file_name": "/etc/passwd"},
    {"file_name": "~/x.json"},
    {"file_name": "*/../../../*.jsonl"},
    {"file_name": "link.jsonl"},
    {"file_name": "a\0b.json"},
    {"file_name": ".", "folder": "../.."},
    {"hf_hub_url": "/etc"},
    {"hf_hub_url": "../home"},
    {"cloud_file_name": "file:///etc/passwd"},
    {"cloud_file_name": "/etc/passwd"},
    {"cloud_file_name": "s3://x::file:///etc/passwd"},
]


@pytest.mark.parametrize("raw", OUTSIDE)
def test_no_entry_leads_outside(board: Board, home: Path, raw: Held) -> None:
    """Neither one that is written here, nor one that stands in the file: it is neither read nor counted."""
    secret = records(home.parent / "secret.jsonl", QA)
    (home / "data").mkdir()
    (home / "data/link.jsonl").symlink_to(secret)
    if raw["file_name" if "file_name" in raw else next(iter(raw))] == "~/x.json":
        (home / "data/~").mkdir()  # a folder of that name is inside, and not the user's
    path = registry(home, {"mine": raw})
    folder = data_folder(board.roots, "data")
    if raw != {"file_name": "~/x.json"}:
        with pytest.raises(UserError):
            folder.put("other", raw)
    assert json.loads(path.read_text(encoding="utf-8")) == {"mine": raw}
    assert all(not one.files for one in listed(folder))
    shown = page.choose(board, held_of({"data.clicked": ("mine", "", 0.0)}))
    assert "Who?" not in shown["data.samples"]
    with pytest.raises(UserError):
        page.look(board, chosen(board, "mine"))


@pytest.mark.parametrize("asked", ["..", "/etc", "up", "a\0b", "ONLINE", "REMOTE:x/y", "file.txt"])
def test_no_folder_lies_outside(board: Board, home: Path, asked: str) -> None:
    (home / "up").symlink_to(home.parent)
    (home / "file.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError):
        data_folder(board.roots, asked)
