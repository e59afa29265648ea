"""The Data tab: files taken safely, and what is in them shown as text."""

import json
import os
from pathlib import Path

import pytest

from data_page import EVIL, QA, chosen, held_of, records, registry, sent
from finery.data.registry import FILE, PACKAGED, find_entry
from finery.errors import UserError
from finery.web import samples, uploads
from finery.web.board import Board
from finery.web.catalogue import data_folder, listed, loose_files
from finery.web.inspecting import MOST_LETTERS, count, inspect
from finery.web.pages import data as page
from finery.web.roots import Roots
from finery.web.texts import texts
from finery.web.uploads import Exists, safe_name, take

EN = texts("en")


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the page says beside itself."""
    said: list[str] = []
    monkeypatch.setattr(page.gr, "Info", said.append)
    return said


# ------------------------------------------------------------------ files that are sent


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        ("a.jsonl", "a.jsonl"),
        ("../../etc/x.json", "x.json"),
        ("C:\\data\\x.csv", "x.csv"),
        ("/abs/x.parquet", "x.parquet"),
        ("a\0b.json", "a_b.json"),
        ("...hidden.json", "hidden.json"),
        (f"{EVIL}.json", "_img src_x onerror_window.hit_1_.json"),
        ("数据 (1).jsonl.gz", "数据 (1).jsonl.gz"),
        ("é" * 300 + ".jsonl", "é" * 90 + ".jsonl"),
    ],
)
def test_names_are_made_safe(given: str, safe: str) -> None:
    assert safe_name(given) == safe


@pytest.mark.parametrize("given", ["x.py", "x", ".json", "..", "", FILE, f"../{FILE}", "dataset_infos.json", "x.json.exe"])
def test_other_names_are_refused(given: str) -> None:
    with pytest.raises(UserError):
        safe_name(given)


def test_a_file_takes_nobodys_place(board: Board, home: Path, tmp_path: Path) -> None:
    """Not a file's, nor that of what a link points to."""
    registry(home, {})
    folder = data_folder(board.roots, "data")
    victim = records(home.parent / "victim.jsonl", "kept")
    (home / "data/link.jsonl").symlink_to(victim)
    (home / "data/dangling.jsonl").symlink_to(home.parent / "made.jsonl")
    for name in ("link.jsonl", "dangling.jsonl"):
        with pytest.raises(Exists):
            take(folder, records(tmp_path / "in", QA), name)
    take(folder, records(tmp_path / "in", QA), "link.jsonl", replaces=True)
    assert victim.read_text(encoding="utf-8") == '"kept"' and not (home.parent / "made.jsonl").exists()
    assert not (home / "data/link.jsonl").is_symlink()
    assert not (tmp_path / "in").exists()
    assert {path.name for path in (home / "data").iterdir()} == {FILE, "link.jsonl", "dangling.jsonl"}


def test_a_file_is_sent_proposed_and_saved(board: Board, home: Path, told: list[str]) -> None:
    """With no folder of data, the packaged sets move into it, so that their names stay."""
    assert "packaged" in page.show_sets(board, held_of({}))["data.notice"]
    rows = [{"question": "Who?", "answer": "Me.", "rest": 1}] * 3
    held = sent(board, "mine.jsonl", *rows)
    assert held["entry.name"] == "mine" and held["entry.prompt"] == "question" and held["entry.response"] == "answer"
    assert held["data.upload"] is None and "mine.jsonl" in held["data.sets"] and "Who?" in held["data.samples"]
    assert "same sample" in held["data.findings"] and "rows: 2" in held["data.findings"]
    assert not list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*.jsonl"))
    page.save(board, held)
    entries = json.loads((home / "data" / FILE).read_text(encoding="utf-8"))
    assert entries["mine"] == {"file_name": "mine.jsonl", "columns": {"prompt": "question", "response": "answer"}}
    assert entries.keys() == json.loads((PACKAGED / FILE).read_text(encoding="utf-8")).keys() | {"mine"}
    assert len(told) == 2
    table = page.show_sets(board, held_of({}))
    assert table["data.notice"] == "" and 'data-file="' not in table["data.sets"]
    assert find_entry("mine", entries).formatting == "alpaca"


def test_a_file_of_a_name_that_is_taken_is_asked_about(board: Board, home: Path) -> None:
    registry(home, {})
    records(home / "data/mine.jsonl", {**QA, "output": "old"})
    for answer, there in (("both", {"mine.jsonl", "mine-2.jsonl", FILE}), ("replace", {"mine.jsonl", "mine-2.jsonl", FILE})):
        held = sent(board, "mine.jsonl", {**QA, "output": answer})
        assert Path(held["data.sent"]).is_file() and "already" in held["data.exists_text"]
        assert '"old"' in (home / "data/mine.jsonl").read_text(encoding="utf-8")
        held = held_of(page.answer(board, held, answer), held)
        assert held["data.sent"] is None and answer in held["data.samples"]
        assert {path.name for path in (home / "data").iterdir()} == there
    assert '"replace"' in (home / "data/mine.jsonl").read_text(encoding="utf-8")
    held = sent(board, "mine.jsonl", QA)
    waiting = Path(held["data.sent"])
    page._decline(board, held)
    assert not waiting.exists()


@pytest.mark.parametrize("name", ["x.py", FILE])
def test_a_file_that_is_refused_leaves_nothing(board: Board, home: Path, name: str) -> None:
    with pytest.raises(UserError):
        sent(board, name, QA)
    assert not list(home.iterdir())
    assert not list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob(name))


def test_only_what_was_sent_is_taken(board: Board, home: Path, tmp_path: Path) -> None:
    mine = records(tmp_path / "mine.jsonl", QA)
    with pytest.raises(UserError, match="no file that was sent"):
        page.receive(board, held_of({"data.upload": str(mine)}))
    assert mine.exists()
    board.upload_bytes = 10
    with pytest.raises(UserError, match="larger than"):
        sent(board, "large.jsonl", QA)


def test_a_file_is_kept_where_the_entries_are_broken(board: Board, home: Path) -> None:
    path = registry(home, "{")
    held = sent(board, "mine.jsonl", QA)
    assert "not JSON" in held["data.findings"] and "not JSON" in held["data.notice"]
    with pytest.raises(UserError, match="not JSON"):
        page.save(board, held)
    assert path.read_text(encoding="utf-8") == "{"


def test_a_demonstration_writes_nothing(board: Board, home: Path) -> None:
    board.is_demo = True
    held = chosen(board, "identity")
    for work in (page.save, page.remove, lambda *asked: sent(board, "mine.jsonl", QA)):
        with pytest.raises(UserError, match="demonstration"):
            work(board, held)
    assert not list(home.iterdir())


def test_packaged_sets_stay_as_they_are(home: Path) -> None:
    board = Board(Roots([home, PACKAGED]))
    with pytest.raises(UserError, match="stay as they are"):
        page.save(board, {**held_of({"data.dataset_dir": str(PACKAGED), "entry.name": "x", "entry.file_name": "identity.json"})})


# ------------------------------------------------------------------ what is in them


def test_nothing_of_data_is_html(board: Board, home: Path) -> None:
    """Names, columns, records, complaints."""
    row = {EVIL: EVIL, "instruction": EVIL, "output": f"{EVIL}</pre><script>"}
    records(home / "data/a.jsonl", row, {"instruction": "", "output": EVIL}, {"instruction": 3})
    (home / "data" / f"{EVIL.replace('/', '')}.jsonl").write_text("{}", encoding="utf-8")
    good = {"file_name": "a.jsonl", "columns": {"system": EVIL}}
    registry(home, {EVIL: good, "b": {"file_name": EVIL}, "c": {EVIL: 1, "formatting": EVIL}, "d": EVIL})
    shown = page.show_sets(board, held_of({}))
    assert shown["data.sets"].count("onerror") >= 5
    found = page.choose(board, held_of({"data.clicked": (EVIL, "", 0.0)}))
    every = "".join([shown["data.sets"], shown["data.notice"], found["data.samples"], found["data.findings"], found["data.title"]])
    assert "<img" not in every and "<script" not in every and "onerror='" not in every
    assert "&lt;img" in found["data.samples"] and "&lt;img" in found["data.title"]


def test_a_file_is_looked_into_apart(home: Path) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 9000}, {"role": "assistant", "content": "y"}], "id": 1}
    records(home / "a.jsonl", long, {"messages": []}, *[long | {"id": number} for number in range(20)])
    found = inspect(home, "a.jsonl", None)
    assert found["entry"] == {"file_name": "a.jsonl", "formatting": "openai"} and found["num_rows"] == 22
    assert found["columns"] == ["messages", "id"]
    (_, text), (role, answer) = found["samples"][0]["parts"]
    assert (role, answer) == ("assistant", "y") and text == "x" * MOST_LETTERS + " […+5,000]"
    assert found["samples"][1]["parts"][0][0] == "broken"
    assert [one["effect"] for one in found["findings"]] == ["left out", "kept"]
    assert found["findings"][1]["num_rows"] == 20


def test_rows_are_counted_anew_where_a_file_has_changed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": [records(home / "a.jsonl", QA, QA)], "b": [records(home / "b.jsonl")]}
    (home / "b.jsonl").write_text("[[", encoding="utf-8")
    assert count(home, files) == {"a": 2}
    with monkeypatch.context() as patched:
        patched.setattr("finery.web.inspecting.subprocess.run", pytest.fail)
        assert count(home, files) == {"a": 2}
    records(home / "a.jsonl", QA, QA, QA)
    assert count(home, files) == {"a": 3}


@pytest.mark.parametrize(
    ("text", "said"), [('{"x": 1}', "cannot be told"), ("{", "none of its first records"), ("", "should hold records"), ("[[[", "JSON")]
)
def test_a_file_that_tells_no_format_says_so(home: Path, text: str, said: str) -> None:
    (home / "a.json").write_text(text, encoding="utf-8")
    found = inspect(home, "a.json", None)
    assert said in found["complaint"] and found["entry"] is None
    assert samples.findings(found, EN).startswith('<div class="warning">')


def test_a_process_that_dies_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finery.web.inspecting.sys.executable", "/bin/false")
    with pytest.raises(UserError, match="ended with code 1"):
        inspect(home, "a.json", None)


def test_hub_sets_are_not_fetched_until_that_is_asked(board: Board, home: Path) -> None:
    registry(home, {"far": {"hf_hub_url": "a/b"}, "cloud": {"cloud_file_name": "s3://b/x.json"}})
    for name in ("far", "cloud"):
        held = chosen(board, name)
        assert held["data.samples"] == held["data.findings"] == ""
        board.is_demo = True
        with pytest.raises(UserError, match="fetches nothing"):
            page.look(board, held)
        board.is_demo = False
    assert "a/b" in page.show_sets(board, held_of({}))["data.sets"]


def test_files_without_an_entry_are_offered_and_no_others(board: Board, home: Path) -> None:
    records(home / "data/a.jsonl", QA)
    records(home / "data/b.jsonl", QA)
    (home / "data/notes.md").write_text("x", encoding="utf-8")
    registry(home, {"a": {"file_name": "a.jsonl"}})
    folder = data_folder(board.roots, "data")
    assert loose_files(folder, list(listed(folder))) == ["b.jsonl"]
    held = held_of(page.choose(board, held_of({"data.clicked": ("", "b.jsonl", 0.0)})))
    assert held["entry.file_name"] == "b.jsonl" and held["data.read"]["read"] is None
    for file in ("../home/data/b.jsonl", "notes.md", "*.jsonl", "a.jsonl"):
        with pytest.raises(UserError, match="no entry names"):
            page.choose(board, held_of({"data.clicked": ("", file, 0.0)}))


def test_what_the_form_holds_is_checked_before_it_is_saved(board: Board, home: Path) -> None:
    records(home / "data/a.jsonl", {"q": "Who?", "output": "Me."})
    registry(home, {"a": {"file_name": "a.jsonl"}})
    held = chosen(board, "a")
    assert "left out" in held["data.findings"]
    found = page.look(board, {**held, "entry.prompt": "q"})
    assert "Nothing to mend" in found["data.findings"] and "Who?" in found["data.samples"]
    assert json.loads((home / "data" / FILE).read_text(encoding="utf-8")) == {"a": {"file_name": "a.jsonl"}}


def test_what_is_left_of_files_that_were_sent_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "finery-uploads-999999999-x").mkdir()
    (tmp_path / f"finery-uploads-{os.getppid()}-x").mkdir()
    (tmp_path / "other").write_text("x", encoding="utf-8")
    with uploads.uploads_folder() as folder:
        assert not (tmp_path / "finery-uploads-999999999-x").exists() and folder.parent == tmp_path
        for name, age in (("old", 7200), ("new", 60)):
            (folder / name).write_text("x", encoding="utf-8")
            then = folder.stat().st_mtime - age
            os.utime(folder / name, (then, then))
        uploads.sweep()
        assert [path.name for path in folder.iterdir()] == ["new"]
    uploads.sweep()  # what other programs keep stays
    assert {path.name for path in tmp_path.iterdir()} == {"other", f"finery-uploads-{os.getppid()}-x"}
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
