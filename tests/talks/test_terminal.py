"""What a person sees: nothing is lost, whatever the screen's height; and what a person may type."""

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from finery.talks.markdown import num_complete, rendered
from finery.talks.screen import Coloured, Plain
from finery.talks.speaker import Speaker
from finery.talks.talk import Talk
from finery.talks.terminal import listen
from finery.talks.words import Desk

TALL = (
    "# Title\n\nFirst\nsecond <b>tag</b>\n\n```\n"
    + "\n".join(f"code {n}" for n in range(60))
    + "\n```\n\n- one\n- two\n\n![pic](u)\n\nEnd."
)


class Terminal:
    """What stands on a terminal after all that was written to it: lines that scroll away stay as they are."""

    def __init__(self, text: str, height: int) -> None:
        self.lines = [""]
        self.row = 0
        for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])", text):
            self._take(part, height)

    def _take(self, part: str, height: int) -> None:
        if part == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif part.startswith("\x1b["):
            if part.endswith("A"):
                self.row -= int(part[2:-1] or 1)
                assert self.row >= len(self.lines) - height, "what has scrolled away is out of reach"
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
        elif part not in ("", "\r"):
            self.lines[self.row] += part

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


@pytest.fixture
def desk(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A person's, on a screen of 80 × 20."""
    monkeypatch.setattr("finery.talks.screen._REFRESH_SECONDS", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=20, highlight=False, color_system="truecolor")
    return Desk(speaker, Coloured(console), Talk(), speaker.options)


def seen(desk: Desk) -> str:
    screen: Any = desk.screen
    return Terminal(screen.console.file.getvalue(), 20).text


def test_an_answer_taller_than_the_screen(desk: Desk) -> None:
    """Each line stands there once, in order, and tags and pictures as they were written."""
    engine: Any = desk.speaker.engine
    engine.script["tall"] = TALL
    desk.say("tall")
    found = [line.strip() for line in seen(desk).splitlines() if line.strip()]
    wanted = ["Title", "First", "second <b>tag</b>", *(f"code {n}" for n in range(60)), "• one", "• two", "!pic (u)", "End."]
    assert found[:-1] == wanted
    assert re.fullmatch(r"\d+ tokens, [\d,.]+ tokens/s, first after \d\.\d\d s", found[-1])


def test_thoughts_fold_to_a_line(desk: Desk) -> None:
    desk.say("think")
    lines = [line for line in seen(desk).splitlines() if line.strip()]
    assert re.fullmatch(r"thought for \d+ tokens, \d\.\d s \(/think shows it\)", lines[0])
    assert lines[1] == "Four." and "Two and two" not in seen(desk)
    desk.do("/think")
    assert "Two and two.\nReally." in seen(desk)


def test_a_model_steers_no_terminal(desk: Desk) -> None:
    engine: Any = desk.speaker.engine
    engine.script["steer"] = "a\x1b[2Jb\x07c\x9b31md"
    desk.say("steer")
    screen: Any = desk.screen
    assert "\x1b[2J" not in screen.console.file.getvalue() and "a[2Jbc31md" in seen(desk)


@given(
    st.lists(st.sampled_from(["a", "b c", "\n", "\n\n", "```\n", "- ", "# ", "|a|b|\n|-|-|\n", "> ", "===\n", "    ", "1. "]), max_size=20)
)
def test_blocks_that_are_complete_stay_what_they_are(pieces: list[str]) -> None:
    """What is drawn in parts is what would be drawn as a whole."""
    text, printed = "", []
    for piece in pieces:
        text += piece
        at = sum(map(len, printed))
        if size := num_complete(text[at:]):
            printed.append(text[at : at + size])
    parts = [*printed, text[sum(map(len, printed)) :]]
    assert "".join(parts) == text
    assert words(drawn(text)) == [word for part in parts for word in words(drawn(part))]


def drawn(text: str) -> str:
    console = Console(file=io.StringIO(), width=60)
    console.print(rendered(text))
    return console.file.getvalue()  # type: ignore[attr-defined]


def words(text: str) -> list[str]:
    """Letters alone: numbers of lists, lines and frames depend on where a part begins."""
    return re.findall(r"[a-z]", text)


def typed(monkeypatch: pytest.MonkeyPatch, desk: Desk, *lines: str | BaseException) -> list[str]:
    """Type lines; returns the prompts."""
    prompts: list[str] = []
    coming: Iterator[str | BaseException] = iter([*lines, EOFError()])

    def input_(prompt: str = "") -> str:
        prompts.append(re.sub(r"[\x01\x02]|\x1b\[[0-9;]*m", "", prompt))
        line = next(coming)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", input_)
    listen(desk, person=True)
    return prompts


def asked(desk: Desk) -> list[str]:
    return [message.content for message in desk.talk.messages if message.role == "user"]


def test_lines_that_go_on(monkeypatch: pytest.MonkeyPatch, desk: Desk) -> None:
    prompts = typed(monkeypatch, desk, "hello \\", "there", '"""', "hello", "", "/you", '"""', " /hello", "exit", "never")
    assert asked(desk) == ["hello \nthere", "hello\n\n/you", "/hello"]
    assert prompts == ["you> ", "...> ", "you> ", *["...> "] * 4, "you> ", "you> "]


def test_ctrl_c_at_the_prompt(monkeypatch: pytest.MonkeyPatch, desk: Desk) -> None:
    """It drops a text that is not whole, and does not end the talk."""
    typed(monkeypatch, desk, KeyboardInterrupt(), '"""', "lost", KeyboardInterrupt(), "hello")
    assert asked(desk) == ["hello"] and "(type `exit` to leave)" in seen(desk)


def test_what_a_person_types_wrong_loses_nothing(monkeypatch: pytest.MonkeyPatch, desk: Desk, tmp_path: Any) -> None:
    (tmp_path / "bad.json").write_text("{")
    bad = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    lines = ["hello", "/foo", "/sav", "/save", f"/load {tmp_path}/bad.json", f"/save {tmp_path}/bad.json", f"/tools {tmp_path}/bad.json"]
    typed(monkeypatch, desk, *lines, "/set top_p=9 seed=1", bad, "/edit", "h\udce9", "fox " * 9000)
    told = re.sub(r"\s+", "", seen(desk))  # lines are broken anywhere in a long path
    for part in (
        "there is no /foo; /help lists the words",
        "there is no /sav; did you mean '/save'?",
        "/save needs a file",
        "bad.json is no JSON",
        "bad.json is there and holds no conversation",
        "should hold a JSON list of function schemas",
        "'top_p' should be at most 1, found 9",
        "that holds bytes which are not UTF-8",
        "/edit needs the new question",
    ):
        assert part.replace(" ", "") in told
    assert asked(desk)[0] == "hello" and desk.options == desk.speaker.options and (tmp_path / "bad.json").read_text() == "{"


def test_words(monkeypatch: pytest.MonkeyPatch, desk: Desk, tmp_path: Any) -> None:
    engine: Any = desk.speaker.engine
    file = tmp_path / "talk.json"
    typed(
        monkeypatch, desk, "/system Be kind.", "hello", f"/save {file}", "/retry", "/edit think", "/clear", f"/load {file}", "/set seed=3"
    )
    assert asked(desk) == ["hello"] and desk.talk.system == "Be kind." and desk.options.seed == 3
    assert [prompt.count("hello") for prompt in engine.prompts] == [1, 1, 0]
    typed(monkeypatch, desk, '/system ""', "/help", "/set", "/think", "/tools", "/exit", "never")
    told = re.sub(r"\s+", " ", seen(desk))
    assert desk.talk.system == "" and "/save FILE: write the conversation" in told and "temperature=0.95" in told and "(no tools)" in told


def test_results_are_asked_for(monkeypatch: pytest.MonkeyPatch, desk: Desk, tmp_path: Any) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "weather"}]')
    prompts = typed(monkeypatch, desk, f"/tools {tmp_path}/tools.json", "weather", "3", "-8")
    assert prompts == ["you> ", "you> ", "weather gave> ", "weather gave> ", "you> "]
    assert '[calls weather with {"city": "Rome"}]' in seen(desk) and "Oslo." in seen(desk)


@pytest.mark.parametrize("coloured", [True, False])
def test_ctrl_c_during_an_answer(desk: Desk, monkeypatch: pytest.MonkeyPatch, coloured: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """What was said stays, on the screen and in the talk, and the talk goes on."""
    desk.screen = desk.screen if coloured else Plain(goes_on=True)
    engine: Any = desk.speaker.engine
    engine.fails = None
    taken = 0

    def interrupted(come: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 40:
            raise KeyboardInterrupt
        return come

    begin = desk.speaker.begin

    def begins(talk: Talk, options: Any) -> Any:
        answering = begin(talk, options)
        take = answering._take
        monkeypatch.setattr(answering, "_take", lambda piece: take(interrupted(piece)))
        return answering

    monkeypatch.setattr(desk.speaker, "begin", begins)
    typed(monkeypatch, desk, "count", "hello")
    said = desk.talk.messages[1].content
    assert said.startswith("0 1 2") and "499" not in said
    shown = re.sub(r"\s+", " ", seen(desk) if coloured else capsys.readouterr().out)
    assert said.strip() in shown and "stopped" in shown and "Hi there" in shown
