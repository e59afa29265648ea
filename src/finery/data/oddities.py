"""What is odd about a record that can be read: it would be learnt as it stands, and hardly anybody means that."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finery.data.formats.base import PLACEHOLDERS, Format, kind_of
from finery.data.sample import Message, Sample

ANSWERS = ("assistant", "function")
BROKEN = "\ufffd"
"""What a decoder writes for bytes that it cannot read."""
_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]+:(//|[\w/+.-]+;base64,)")


@dataclass(frozen=True)
class Oddity:
    """Where in a record, what, and what would mend it. Those of one `kind` are odd in the same way, whatever their words are."""

    path: str
    what: str
    mend: str
    kind: str = ""


class Oddities:
    """Looks at one record after the other of a data set."""

    def __init__(self, form: Format, unfilled: Collection[str], reads: Collection[str] | None = None) -> None:
        """`unfilled` are words that nobody fills in, `reads` the media columns that the stage reads (nothing: whatever there is)."""
        self.form = form
        self.reads = reads
        self._unfilled = [f"{{{{{word}}}}}" for word in unfilled]
        self._tools: tuple[str, frozenset[str]] = ("", frozenset())  # the last text of tools, and the names in it

    def of(self, record: Mapping[str, Any], sample: Sample, folder: Path) -> Iterator[Oddity]:
        """All that is odd about one record and the sample that it became; paths of media are looked for from `folder`."""
        columns = self.form.columns
        for number, message in enumerate(sample.messages):
            if self._suspect(message):
                yield from self._message(message, self.form.where(record, number))
        for role, message in (("chosen", sample.chosen), ("rejected", sample.rejected)):
            if message is not None and self._suspect(message):
                yield from self._message(message, repr(getattr(columns, role)))
        if sample.system:
            at = repr(columns.system) if columns.system and record.get(columns.system) else f"{columns.messages!r}[0]"
            yield from self._text(sample.system, at)
        if sample.chosen is not None and sample.chosen == sample.rejected:
            yield Oddity(repr(columns.rejected), f"is the same as {columns.chosen!r}", "a pair needs a worse answer; take the row out")
        if sample.trailing:
            mend = "add the answer that follows, or take them out"
            yield Oddity(repr(columns.messages), "ends with a tool's result that no answer follows, which is not read", mend)
        if len(record) > 1 and all(name == value for name, value in record.items()):
            yield Oddity("", "repeats the names of the columns", "take the row out: the file seems to be put together from several")
        if sample.tools or any(message.role == "function" for message in sample.messages):
            yield from self._calls(record, sample)
        yield from self._media(sample, folder)

    def _suspect(self, message: Message) -> bool:
        """Whether a message is worth a closer look; nearly none is, and this is asked of all."""
        text = message.content
        return not text or text.isspace() or BROKEN in text or "{{" in text or bool(message.thought or message.before_calls)

    def _message(self, message: Message, at: str) -> Iterator[Oddity]:
        text = message.content
        answers = message.role in ANSWERS
        if not text.strip() and message.role != "observation" and message.train is not False:
            empty = "holds nothing but spaces" if text else "is empty"
            if answers:
                yield Oddity(at, f"the answer {empty}", "write an answer, or take the row out: the model would learn to say nothing")
            else:
                yield Oddity(at, f"the question {empty}", "write a question, or take the row out")
        yield from self._text(f"{message.thought}{message.before_calls}{text}", at)

    def _text(self, text: str, at: str) -> Iterator[Oddity]:
        if BROKEN in text:
            place = text.index(BROKEN)
            near = text[max(place - 12, 0) : place + 12]
            mend = "the text was once read in a wrong encoding: make the file anew from its source"
            yield Oddity(at, f"holds the replacement character U+FFFD (near {near!r})", mend, f"U+FFFD {at}")
        for word in self._unfilled:
            if word in text:
                yield Oddity(at, f"still says {word}", f"set 'placeholders' to {{{word.strip('{}')}: ...}} to fill it in")

    def _calls(self, record: Mapping[str, Any], sample: Sample) -> Iterator[Oddity]:
        if sample.tools != self._tools[0]:
            tools = json.loads(sample.tools) if sample.tools else []
            every = tools if isinstance(tools, list) else [tools]
            self._tools = (sample.tools, frozenset((tool.get("function") or tool)["name"] for tool in every))
        yield from self._constants(sample.tools, repr(self.form.columns.tools))
        for number, message in enumerate(sample.messages):
            if message.role != "function":
                continue
            yield from self._constants(message.content, at := self.form.where(record, number))
            calls = json.loads(message.content)
            names = [call["name"] for call in (calls if isinstance(calls, list) else [calls])]
            for name in names:
                if sample.tools and name not in self._tools[1]:
                    mend = "correct the name, or add the tool's schema"
                    yield Oddity(at, f"calls {name[:80]!r}, which is not among the record's tools", mend, f"unknown tool {at}")

    def _constants(self, text: str, at: str) -> Iterator[Oddity]:
        """NaN and Infinity: Python reads and writes them, and nobody else."""
        if "NaN" not in text and "Infinity" not in text:
            return
        found: list[str] = []
        json.loads(text, parse_constant=found.append)
        if found:
            yield Oddity(at, f"holds {found[0]}, which is no JSON", "write a number, or null")

    def _media(self, sample: Sample, folder: Path) -> Iterator[Oddity]:
        for role, word in PLACEHOLDERS.items():
            things, column = getattr(sample, role), getattr(self.form.columns, role)
            if not things and not column:
                continue  # a text may speak of <image> without meaning one
            at = repr(column) if column else ""
            if things and self.reads is not None and role not in self.reads:
                mend = f"take the {role} and their {word} out"
                yield Oddity(at, f"the record holds {role}, which this stage does not read: only {word} would be learnt", mend)
                continue
            texts = [message.content for message in (*sample.messages, *filter(None, (sample.chosen,)))]
            if (count := sum(text.count(word) for text in texts)) != len(things):
                yield Oddity(at, f"holds {len(things)}, but the texts have {count} {word}", f"write {word} once where each belongs")
            for thing in things:
                for piece in thing if isinstance(thing, (list, tuple)) else (thing,):  # a video may be a list of frames
                    yield from _medium(piece, at, role, folder)


def _medium(thing: Any, at: str, role: str, folder: Path) -> Iterator[Oddity]:
    """What is wrong with a path, an address, or an object with bytes."""
    given = (thing.get("bytes") or thing.get("path") or thing.get("url")) if isinstance(thing, Mapping) else thing
    if isinstance(given, (bytes, bytearray)):
        return
    if not isinstance(given, str):
        found = f"found {kind_of(thing)}"
        yield Oddity(at, f"the {role[:-1]} should be a path, an address, or an object with 'bytes', {found}", "write the path of a file")
    elif not _ADDRESS.match(given):
        path = next((path for path in (folder / given, Path(given)) if path.exists()), None)
        if path is None:
            mend = "put it there, or write its path as it is seen from the folder of the data"
            yield Oddity(at, f"there is no file {given[:200]!r}", mend, f"no file {role}")
        elif path.is_file() and not path.stat().st_size:
            yield Oddity(at, f"the file {given[:200]!r} is empty", "copy it again", f"empty file {role}")


def repeated_key(text: str) -> str | None:
    """A key that stands twice in one object of JSON text: only the last value is read."""
    found: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            found.append(next(name for place, name in enumerate(names) if name in names[:place]))

    json.loads(text, object_pairs_hook=pairs)
    return found[0] if found else None
