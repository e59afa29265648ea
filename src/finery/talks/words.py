"""Words that begin with a slash: what a person does to a talk beside talking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finery.data.sample import Message
from finery.errors import UserError, suggestion
from finery.talks.files import load, save
from finery.talks.options import TalkOptions
from finery.talks.screen import Screen
from finery.talks.speaker import Speaker
from finery.talks.talk import Talk


class Left(Exception):
    """The talk is over."""


@dataclass
class Desk:
    """A talk, how its answers are drawn, and where it is shown. The first line of a word's docstring is its help."""

    speaker: Speaker
    screen: Screen
    talk: Talk
    options: TalkOptions
    thought: str = field(default="", init=False)  # the last one

    def say(self, text: str) -> None:
        """Say something; it is answered once no result is owed any more. What cannot be answered was not said."""
        before = list(self.talk.messages)
        self.talk.say(text)
        if self.talk.due:
            self._answer(before)

    def do(self, line: str) -> None:
        """Do what a line says that begins with a slash; raises `UserError`, which has changed nothing."""
        word, _, rest = line[1:].partition(" ")
        if word not in WORDS:
            near = suggestion(f"/{word}", (f"/{name}" for name in WORDS)) if word else ""
            raise UserError(f"there is no /{word}{near}; /help lists the words (to say it to the model, put a space before it)")
        WORDS[word](self, rest.strip())

    def _answer(self, before: list[Message]) -> None:
        try:
            answering = self.speaker.begin(self.talk, self.options)
        except BaseException:
            self.talk.messages[:] = before
            raise
        self.screen.answer(answering)
        self.thought = answering.thought

    def help(self, rest: str) -> None:
        """/help: this list"""
        lines = [word.__doc__ or "" for word in WORDS.values()]
        self.screen.note("\n".join([*lines, *_BESIDE]))

    def clear(self, rest: str) -> None:
        """/clear (or clear): forget the conversation; system text, tools and settings stay"""
        self.talk.clear()
        self.screen.note("(forgotten)")

    def save(self, rest: str) -> None:
        """/save FILE: write the conversation to a JSON file, in the shape of OpenAI's messages"""
        path = _path(rest, "save")
        save(self.talk, path)
        self.screen.note(f"({len(self.talk.messages)} messages are in {path})")

    def load(self, rest: str) -> None:
        """/load FILE: go on with a conversation from such a file, in place of this one"""
        path = _path(rest, "load")
        self.talk = load(path)
        self.screen.note(f"({len(self.talk.messages)} messages from {path})")
        if self.talk.due:
            self._answer(list(self.talk.messages))

    def system(self, rest: str) -> None:
        """/system TEXT: another system text, from the next answer on; "" for none; alone: show it"""
        if rest:
            self.talk.tell("" if rest == '""' else rest)
        self.screen.note(self.talk.system or "(no system text)")

    def tools(self, rest: str) -> None:
        """/tools FILE: tools from a JSON file of function schemas; "" for none; alone: name them"""
        if rest:
            self.talk.offer("") if rest == '""' else offer_file(self.talk, Path(rest).expanduser())
        names = self.talk.offer(self.talk.tools)
        self.screen.note(", ".join(names) or "(no tools)")
        if names and self.speaker.dialect is None:
            self.screen.note(f"{self.speaker.template.told} calls tools in no way that Finery reads: answers are shown as they are written")

    def set(self, rest: str) -> None:
        """/set NAME=VALUE …: how answers are drawn, as temperature=0.2; alone: show all values"""
        self.options = self.options.changed_by(rest.split())
        self.screen.note(rest or "\n".join(self.options.told()))

    def think(self, rest: str) -> None:
        """/think: show the last thought"""
        self.screen.thought(self.thought or "(no thought)")

    def retry(self, rest: str) -> None:
        """/retry: answer the last question once more"""
        before = list(self.talk.messages)
        self.talk.take_back()
        self._answer(before)

    def edit(self, rest: str) -> None:
        """/edit TEXT: ask this instead of the last question"""
        if not rest:
            raise UserError("/edit needs the new question")
        before = list(self.talk.messages)
        self.talk.forget_question()
        self.talk.say(rest)
        self._answer(before)

    def exit(self, rest: str) -> None:
        """/exit (or exit, or Ctrl-D): leave"""
        raise Left


WORDS: dict[str, Callable[[Desk, str], None]] = {
    word.__name__: word
    for word in (
        Desk.help,
        Desk.clear,
        Desk.retry,
        Desk.edit,
        Desk.think,
        Desk.system,
        Desk.tools,
        Desk.set,
        Desk.save,
        Desk.load,
        Desk.exit,
    )
}
_BESIDE = (
    'A line that ends with a backslash goes on in the next one; so does all between two lines of """.',
    "Ctrl-C stops an answer. Where the model calls a tool, what you say next is the tool's result.",
)


def _path(text: str, word: str) -> Path:
    if not text:
        raise UserError(f"/{word} needs a file")
    return Path(text).expanduser()


def offer_file(talk: Talk, path: Path) -> None:
    """Offer the tools of a file; raises `UserError` where it holds none."""
    try:
        talk.offer(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"{path} should hold a JSON list of function schemas: {error}") from None
