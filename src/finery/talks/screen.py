"""How a talk looks: plain text for scripts, colours and Markdown for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from finery.data.dialects.base import Call, dump
from finery.log import plural
from finery.talks.answering import Answering
from finery.talks.markdown import harmless, num_complete, rendered

_REFRESH_SECONDS = 0.08


class Screen(Protocol):
    """Where a talk is shown."""

    def answer(self, answering: Answering) -> None:
        """Show an answer as it comes; Ctrl-C ends it early."""

    def note(self, text: str) -> None:
        """Say something about the talk."""

    def thought(self, text: str) -> None:
        """Show a whole thought."""


def called(call: Call) -> str:
    """A call in a line."""
    return f"[calls {call.name} with {dump(call.arguments)}]"


class Plain:
    """Answers as they are, on standard output; all else on standard error, so that a script finds answers alone."""

    def __init__(self, goes_on: bool = False) -> None:
        """Whether the talk goes on when Ctrl-C has stopped an answer."""
        self.goes_on = goes_on

    def answer(self, answering: Answering) -> None:
        """Thoughts are left out."""
        told = 0
        try:
            for _ in answering:
                print(answering.content[told:], end="", flush=True)
                told = len(answering.content)
        except KeyboardInterrupt:
            print(f"{answering.content[told:]} [stopped]", flush=True)
            if not self.goes_on:
                raise
            return
        lines = [*([""] if answering.content or not answering.calls else []), *map(called, answering.calls)]
        print("\n".join(lines), flush=True)

    def note(self, text: str) -> None:
        """Beside the answers."""
        print(text, file=sys.stderr)

    def thought(self, text: str) -> None:
        """Beside the answers, too."""
        self.note(text)


class _Tail:
    """The last lines of something: what is on its way never grows beyond the screen."""

    def __init__(self, inner: Group, num_lines: int) -> None:
        self.inner = inner
        self.num_lines = num_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.inner, options.update(height=None), pad=False)[-self.num_lines :]
        for place, line in enumerate(lines):
            if place:
                yield Segment.line()
            yield from line


class Coloured:
    """For a person: thoughts are dim and fold to a line, Markdown is drawn block by block, and a line tells how fast it went."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def answer(self, answering: Answering) -> None:
        """What is complete is printed above what is on its way."""
        shown = _Shown(self.console, answering)
        try:
            with shown.live:
                for _ in answering:
                    shown.draw()
        except KeyboardInterrupt:
            pass
        shown.finish()

    def note(self, text: str) -> None:
        """In dim letters."""
        self.console.print(Text(harmless(text), style="dim"))

    def thought(self, text: str) -> None:
        """In dim letters."""
        self.note(text)


class _Shown:
    """One answer on a coloured screen."""

    def __init__(self, console: Console, answering: Answering) -> None:
        self.console = console
        self.answering = answering
        self.live = Live(Text("…", style="dim"), console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self.num_printed = 0  # letters of the answer that are drawn for good
        self.folded = False
        self._drawn = 0.0

    def draw(self) -> None:
        """Draw what has come, but not too often."""
        now = time.monotonic()
        if now - self._drawn < _REFRESH_SECONDS:
            return
        self._drawn = now
        answering = self.answering
        if not answering.thinks:
            self._fold()
            self._print(num_complete(answering.content[self.num_printed :]))
        on_its_way = answering.content[self.num_printed :]
        inner = Text(harmless(answering.thought), style="dim italic") if answering.thinks else rendered(on_its_way or "…")
        between = [Text("")] if self.num_printed else []
        self.live.update(_Tail(Group(*between, inner), max(self.console.height - 2, 1)), refresh=True)

    def _fold(self) -> None:
        answering = self.answering
        if answering.thought and not self.folded:
            self.folded = True
            told = f"thought for {plural(answering.num_thought_tokens, 'token')}, {answering.thought_seconds:.1f} s (/think shows it)"
            self.console.print(Text(told, style="dim italic"))

    def _print(self, size: int) -> None:
        """Draw so many letters more for good."""
        text = self.answering.content[self.num_printed : self.num_printed + size]
        if text.strip():
            if self.num_printed:
                self.console.print()
            self.console.print(rendered(text))
        self.num_printed += size

    def finish(self) -> None:
        """The rest, the calls, and how it went."""
        self._fold()
        self._print(len(self.answering.content) - self.num_printed)
        for call in self.answering.calls:
            self.console.print(Text(harmless(called(call)), style="yellow"))
        self.console.print(Text(speed_of(self.answering), style="dim"))


def speed_of(answering: Answering) -> str:
    """`57 tokens, 21.3 tokens/s, first after 0.11 s`."""
    told: Sequence[str] = [plural(answering.num_tokens, "token")]
    if answering.tokens_per_second is not None:
        told.append(f"{answering.tokens_per_second:.1f} tokens/s")
    if answering.first_seconds is not None:
        told.append(f"first after {answering.first_seconds:.2f} s")
    ends = {"length": ["cut off at max_new_tokens"], "stopped": ["stopped"]}
    return ", ".join([*told, *ends.get(answering.finish or "", [])])
