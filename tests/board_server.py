"""The board as its users start it: a process in a folder of its own, and windows that watch for whatever goes wrong in them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from background import own_jobs
from finery.web.texts import LANGUAGES

_STARTS_WITHIN = 180  # seconds, on a machine that does other things too
LONGEST = 180_000  # milliseconds for what a run or a model has to do first
_LEAVING = ("AbortError", "aborted", "Connection errored out")  # what Gradio says of its own requests when a page is left


@dataclass
class Served:
    """A board at work, in a folder of its own."""

    home: Path
    more: tuple[Path, ...]  # that it may touch, too
    said: Path
    url: str = ""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """As a person starts it."""
        command = [
            sys.executable,
            "-P",
            "-m",
            "finery",
            "webui",
            "--port",
            "0",
            *(word for root in self.more for word in ("--root", str(root))),
        ]
        environment = {**os.environ, "PYTHONWARNINGS": ""}
        with self.said.open("w") as out:
            self.process = subprocess.Popen(command, cwd=self.home, stdout=out, stderr=subprocess.STDOUT, env=environment)
        self.url = _address(self.process, self.said)

    def kill(self) -> None:
        """As a crash does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)


@contextmanager
def serving(folder: Path, *more: Path) -> Iterator[Served]:
    """`finery webui` in a new folder; it and the runs that it started are ended at the end."""
    board = Served(folder / "home", more, folder / "said")
    board.home.mkdir()
    with pytest.MonkeyPatch.context() as changed, own_jobs(folder / "jobs", changed):
        try:
            board.start()
            yield board
        finally:
            if board.process is not None:
                board.process.terminate()
                board.process.wait(30)


def _address(process: subprocess.Popen[bytes], said: Path) -> str:
    for _ in range(_STARTS_WITHIN * 20):
        if found := re.search(r"the page is at (\S+)", said.read_text()):
            return found[1]
        assert process.poll() is None, said.read_text()
        time.sleep(0.05)
    raise AssertionError(said.read_text())


@dataclass
class Window:
    """One browser window. `clicks` counts what a hand would do, a click into a field that is typed into among it."""

    page: Any
    url: str
    clicks: int = 0
    faults: list[str] = field(default_factory=list)
    leaves: bool = False

    def __post_init__(self) -> None:
        page = self.page
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self._complain(str(error)))
        page.on("console", lambda said: said.type == "error" and self._complain(said.text))
        page.on("response", lambda told: told.status >= 400 and self._complain(f"{told.status} {told.url}"))
        page.on("request", lambda asked: self._foreign(asked.url) and self.faults.append(f"asked {asked.url}"))

    def _complain(self, text: str) -> None:
        if not (self.leaves and any(word in text for word in _LEAVING)):
            self.faults.append(text)

    def _foreign(self, url: str) -> bool:
        return not url.startswith((self.url, "data:", "blob:"))

    # ------------------------------------------------------------------ what a hand does

    def open(self, tab: str = "") -> None:
        """Open the page, and wait until it holds what it held."""
        self.leaves = True
        self.page.goto(f"{self.url}/{f'#{tab}' if tab else ''}")
        self.ready()
        self.leaves = False

    def ready(self) -> None:
        """Wait until it holds what it held."""
        self.page.wait_for_function("window.tabsRestored === true")

    def reload(self) -> None:
        """As F5 does."""
        self.leaves = True
        self.page.reload()
        self.ready()
        self.leaves = False

    def speak(self, language: str) -> None:
        """Choose a language: the page is then opened in it."""
        self.leaves = True
        self.choose("top-lang", LANGUAGES[language])
        self.page.wait_for_url(f"**/{language}/**")
        self.ready()
        self.leaves = False

    def click(self, id: str) -> None:
        """A button."""
        self.clicks += 1
        self.page.click(f"#{id}")

    def tab(self, name: str) -> None:
        """Open a tab."""
        self.clicks += 1
        is_open = self.page.get_attribute(f"#tab-{name}-button", "aria-selected") == "true"
        self.page.click(f"#tab-{name}-button")
        if not is_open:
            self.page.wait_for_function(f"location.hash === '#{name}'")

    def fill(self, id: str, text: str, key: str = "Tab") -> None:
        """Type into a field, and leave it by a key."""
        self.clicks += 1
        place = self.page.locator(f"#{id} :is(input, textarea)").first
        place.fill(text)
        place.press(key)

    def choose(self, id: str, text: str) -> None:
        """Choose from a list by what it shows."""
        self.clicks += 2
        self.page.locator(f"#{id} input").first.click()
        self.page.locator("[role=option]", has_text=text).first.click()

    # ------------------------------------------------------------------ what an eye sees

    def text(self, id: str) -> str:
        """What a part shows; nothing while it is not there."""
        found = self.page.locator(f"#{id}")
        return found.first.inner_text() if found.count() else ""

    def value(self, id: str) -> str:
        """What a field holds."""
        return self.page.locator(f"#{id} :is(input, textarea)").first.input_value()

    def until(self, id: str, pattern: str, longest: int = LONGEST) -> str:
        """Wait until a part shows what a pattern finds; returns all that it shows then: a second look might find it drawn anew."""
        look = """([id, pattern]) => {
            const text = document.getElementById(id)?.innerText ?? "";
            return new RegExp(pattern, "s").test(text) && [text];
        }"""
        try:
            (shown,) = self.page.wait_for_function(look, arg=[id, pattern], timeout=longest).json_value()
        except Exception as error:
            told = self.page.locator(".toast-body").all_inner_texts()
            raise AssertionError(f"#{id} shows {self.text(id)!r}, not /{pattern}/; the page told {told}; faults: {self.faults}") from error
        return shown

    def holds(self, id: str, value: str) -> None:
        """Wait until a field holds a value."""
        look = "([id, value]) => document.querySelector(`#${id} :is(input, textarea)`)?.value === value"
        self.page.wait_for_function(look, arg=[id, value])

    def keeps(self, id: str, value: str) -> None:
        """Wait until the browser keeps what was typed: that is written after the field was left, and a page that goes writes no more."""
        look = "([id, value]) => String(JSON.parse(localStorage.getItem('finery-board') || '{}')[id]) === value"
        self.page.wait_for_function(look, arg=[id.replace("-", ".", 1), value])

    def is_at(self, tab: str) -> None:
        """Wait until a tab is the one that is seen, and the address names it."""
        look = """tab => document.getElementById(`tab-${tab}-button`)?.getAttribute("aria-selected") === "true"
            && location.hash === `#${tab}`"""
        self.page.wait_for_function(look, arg=tab)

    def no_script_ran(self) -> bool:
        """Whether no text of data, models and files became a part of the page: each of them would have set `hit`."""
        return self.page.evaluate("window.hit === undefined && document.querySelector('img[onerror], b.hit') === null")
