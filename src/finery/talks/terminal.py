"""Lines from a person or a script, and what becomes of them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator

from rich.console import Console

from finery.errors import UserError
from finery.talks.screen import Coloured, Plain, Screen
from finery.talks.words import WORDS, Desk, Left

_BARE = {"exit": "/exit", "clear": "/clear"}
"""Words that need no slash, as the reference has them."""
_QUOTES = '"""'

Reading = Callable[[bool], str | None]
"""Gives the next line, or nothing at the end; told whether it stands inside of a text of several."""


def screen_for(person: bool) -> Screen:
    """Colours where a person reads; what the output's encoding cannot say never ends the talk."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    console = Console(highlight=False)
    return Coloured(console) if person and not console.is_dumb_terminal else Plain(goes_on=person)


def has_person() -> bool:
    """Whether somebody sits at the terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def listen(desk: Desk, person: bool) -> None:
    """Answer what is said, until the input ends or says so. A person is told of mistakes and goes on, a script ends with them."""
    for text in _joined(_typed(desk) if person else _piped()):
        try:
            if text.startswith("/") or text in _BARE:
                desk.do(_BARE.get(text, text))
            elif text.strip():
                desk.say(text.strip())
        except Left:
            return
        except UserError as error:
            if not person:
                raise
            desk.screen.note("\n".join(error.complaints))
        except KeyboardInterrupt:
            if not person:
                raise


def _joined(read: Reading) -> Iterator[str]:
    """Lines put together: one that ends with a backslash goes on, and so does all between two lines of quotes. Ctrl-C drops the whole."""
    while (line := read(False)) is not None:
        try:
            if line.strip() == _QUOTES:
                line = "\n".join(iter(lambda: _QUOTES if (more := read(True)) is None or more.strip() == _QUOTES else more, _QUOTES))
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{read(True) or ''}"
        except KeyboardInterrupt:
            continue
        yield line


def _piped() -> Reading:
    """Lines of standard input, in UTF-8."""
    numbered = enumerate(sys.stdin.buffer, 1)

    def read(inside: bool) -> str | None:
        number, line = next(numbered, (0, b""))
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n") if number else None
        except UnicodeDecodeError as error:
            found = f"found the byte 0x{line[error.start]:02x} after {error.start} others"
            raise UserError(f"standard input, line {number}: should be UTF-8, {found}") from None

    return read


def _typed(desk: Desk) -> Reading:
    """Lines that a person types, with a history and completion of words where the system has them."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_completer(_complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
    desk.screen.note("Type a message; /help lists what else there is, Ctrl-C stops an answer, Ctrl-D leaves.")

    def read(inside: bool) -> str | None:
        while True:
            try:
                owed = desk.talk.owed
                return input(_prompt("...> " if inside else f"{owed[0].name} gave> " if owed else "you> ")).rstrip("\r")
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                if inside:
                    raise
                desk.screen.note("(type `exit` to leave)")
            except UnicodeDecodeError:
                desk.screen.note("that holds bytes which are not UTF-8: it was not said")

    return read


def _prompt(text: str) -> str:
    """In colour; readline is told which letters take no room."""
    return text if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else f"\001\033[1;36m\002{text}\001\033[0m\002"


def _complete(text: str, state: int) -> str | None:
    found = [f"/{word} " for word in WORDS if f"/{word}".startswith(text)] if text.startswith("/") else []
    return found[state] if state < len(found) else None
