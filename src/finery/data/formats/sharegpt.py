"""ShareGPT: a list of messages, each with a role and a text under names that `tags` may change."""

import json
import re
from collections.abc import Mapping
from typing import Any

from finery.data.formats.base import PAIR, SHARED, Columns, Format, Tags, as_flag, as_json, as_text, kind_of, read_json
from finery.data.sample import BadRecord, Message, Role, Sample

__all__ = ["ShareGPT"]

ANSWERS = ("assistant", "function")
CALLS = re.compile(r"<(?:tool_call|\|tool_call_start\|)>(.*?)<(?:/tool_call|\|tool_call_end\|)>", re.DOTALL)

Placed = list[tuple[str, Any]]
"""Messages as the record has them, each after its path inside the record."""
Found = dict[str, list[Any]]
"""Media that stand inside messages, by kind."""


class ShareGPT(Format):
    """Columns messages, system, tools, media, and for pairs chosen and rejected; a leading system message wins over the column."""

    reads = ("messages", *SHARED)
    results_in_a_row = False  # whether several tools may answer one turn; results at the end, which no answer follows, are then taken off

    def __init__(self, columns: Columns, tags: Tags, ranking: bool = False) -> None:
        super().__init__(columns, tags, ranking)
        self.roles = self.role_words()

    def role_words(self) -> dict[str, Role]:
        """What a message may call its role."""
        tags = self.tags
        return {
            tags.system_tag: "system",
            tags.function_tag: "function",
            tags.observation_tag: "observation",
            tags.assistant_tag: "assistant",
            tags.user_tag: "user",
        }

    def read(self, record: Mapping[str, Any]) -> Sample:
        """Turns alternate: a question or a tool's result, then an answer or a tool call."""
        facts = self.shared(record)
        inside: Found = {}
        placed, pair = self.entries(record), []
        if self.ranking:
            placed, pair = self._pair(record, placed)
        messages = [self.message(entry, at, inside) for at, entry in placed]
        system = self.text(record, self.columns.system)
        if messages and messages[0].role == "system":
            system = messages.pop(0).content
            placed = placed[1:]
        if self.results_in_a_row and not self.ranking:
            facts["trailing"] = _take_results_off(messages)
        if self._check_turns(messages, placed):
            if self.ranking:
                raise BadRecord(f"{placed[-1][0]} is an answer, where 'chosen' and 'rejected' should answer a question")
        elif not self.ranking:
            facts["unanswered"] = "the conversation ends with a question"
        for role, answer in zip(PAIR, pair, strict=False):
            facts[role] = self._answer(*answer, inside)
        for role, media in inside.items():
            if facts.get(role):
                raise BadRecord(f"{role} stand both in {getattr(self.columns, role)!r} and inside of messages: keep one")
            facts[role] = tuple(media)
        return Sample(tuple(messages), system, **facts)

    def where(self, record: Mapping[str, Any], number: int) -> str:
        """The text of an entry; a system message that stands first is none of the sample's messages."""
        placed = self.entries(record)
        if self.ranking:
            placed, _ = self._pair(record, placed)
        has_system = self.role(placed[0][1], placed[0][0]) == "system"
        at, entry = placed[number + has_system]
        return f"{at}.{'tool_calls' if entry.get('tool_calls') else self.tags.content_tag}"

    def entries(self, record: Mapping[str, Any]) -> Placed:
        """The messages of a record as it has them; a pair may come without, if it holds whole conversations."""
        column = self.messages_column(record)
        value = record.get(column) if column else None
        if value is None and self.ranking:
            return []
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = read_json(value, repr(column))  # in a .csv file, say
        if not isinstance(value, (list, tuple)):
            raise BadRecord(f"{column!r} should be a list of messages, found {kind_of(value)}")
        return [(f"{column!r}[{place}]", entry) for place, entry in enumerate(value)]

    def messages_column(self, record: Mapping[str, Any]) -> str | None:
        """Where the conversation stands."""
        return self.columns.messages

    def answers(self, value: Any, column: str) -> Placed:
        """What a column holds that answers: a text, a message, or a list of messages that ends with the answer."""
        if isinstance(value, str):
            value = {self.tags.role_tag: self.tags.assistant_tag, self.tags.content_tag: value}
        if isinstance(value, Mapping):
            return [(repr(column), value)]
        if not isinstance(value, (list, tuple)) or not value:
            raise BadRecord(f"{column!r} should be an answer, as text or as a message, found {kind_of(value)}")
        return [(f"{column!r}[{place}]", entry) for place, entry in enumerate(value)]

    def message(self, entry: Any, at: str, inside: Found) -> Message:
        """A message of the conversation; media that it holds are added to `inside`."""
        role = self.role(entry, at)
        if entry.get("tool_calls"):
            raise BadRecord(f"{at} has 'tool_calls', which 'formatting: openai' reads and this format does not")
        content = self.content(entry, at)
        train = self.learnt(entry, role, at)
        if role == "function":
            content, before = split_calls(content, f"{at}.{self.tags.content_tag}")
            return Message(role, content, "", before, train)
        return Message(role, content, train=train)

    def role(self, entry: Any, at: str) -> Role:
        """The role of a message, whatever this data set calls it."""
        tag = self.tags.role_tag
        if not isinstance(entry, Mapping) or tag not in entry:
            found = ", ".join(map(repr, list(entry)[:8])) if isinstance(entry, Mapping) else kind_of(entry)
            raise BadRecord(f"{at} should be a message with {tag!r} and {self.tags.content_tag!r}, found {found}")
        word = entry[tag]
        if not isinstance(word, str):
            raise BadRecord(f"{at}.{tag} should be text, found {kind_of(word)}")
        if word not in self.roles:
            raise BadRecord(f"{at}.{tag} should be one of {', '.join(map(repr, reversed(self.roles)))}, found {word[:40]!r}")
        return self.roles[word]

    def content(self, entry: Mapping[str, Any], at: str) -> str:
        """The text of a message."""
        text = entry.get(self.tags.content_tag)
        return text if type(text) is str and text.isascii() else as_text(text, f"{at}.{self.tags.content_tag}")

    def learnt(self, entry: Mapping[str, Any], role: Role, at: str) -> bool | None:
        """What a message itself says about whether it is learnt."""
        if entry.get("train") is None:
            return None
        if (train := as_flag(entry["train"], f"{at}.train")) and role not in ANSWERS:
            raise BadRecord(f"{at} is to be learnt, but only answers are; 'train_on_prompt' learns all questions")
        return train

    def _check_turns(self, messages: list[Message], placed: Placed) -> bool:
        """Whether the last message is an answer; raises where two questions or two answers follow each other."""
        if not messages:
            where = repr(self.columns.messages) if self.columns.messages else "the record"
            raise BadRecord(f"{where} holds no question and no answer")
        answered, before = True, ""
        for message, (at, entry) in zip(messages, placed, strict=False):
            several = self.results_in_a_row and message.role == before == "observation"
            if message.role == "system":
                raise BadRecord(f"{at} is a system message, which should stand first and be the only one")
            if (message.role in ANSWERS) == answered and not several:
                due = "a question or a tool's result" if answered else "an answer or a tool call"
                raise BadRecord(f"{at} is of role {entry[self.tags.role_tag]!r} where {due} is due")
            answered, before = message.role in ANSWERS, message.role
        return answered

    def _pair(self, record: Mapping[str, Any], placed: Placed) -> tuple[Placed, Placed]:
        """The conversation and its two answers. Where both sides hold the whole conversation, they share all but the last message."""
        sides = [self.answers(record.get(column), column) for role in PAIR if (column := getattr(self.columns, role))]
        before, other = ([entry for _, entry in side[:-1]] for side in sides)
        if before != other:
            raise BadRecord("'chosen' and 'rejected' should be the same conversation but for its last message")
        if before and [entry for _, entry in placed] != before[: len(placed)]:
            raise BadRecord(f"'chosen' holds a conversation that does not begin with {self.columns.messages!r}")
        return sides[0][:-1] if before else placed, [side[-1] for side in sides]

    def _answer(self, at: str, entry: Any, inside: Found) -> Message:
        message = self.message(entry, at, inside)
        if message.role not in ANSWERS:
            raise BadRecord(f"{at} is of role {entry[self.tags.role_tag]!r} where an answer or a tool call is due")
        return message


def split_calls(text: str, at: str) -> tuple[str, str]:
    """The calls of a function turn as JSON text, and what the assistant says beside them.

    The turn is JSON alone, or JSON between <tool_call> words, or JSON after a thought that ends with </think>.
    """
    pieces, before = [text], ""
    if ("</" in text or "<|" in text) and not _is_json(text):
        if found := CALLS.findall(text):
            pieces, before = found, "".join(rest for rest in CALLS.split(text)[::2] if rest.strip())
        elif thought := re.match(r".*</think>\s*", text, re.DOTALL):
            pieces, before = [text[thought.end() :]], thought[0]
    values = [read_json(piece, at) for piece in pieces]
    if len(values) > 1 or isinstance(values[0], list):
        several = [call for value in values for call in (value if isinstance(value, list) else [value])]
        calls = [read_call(call, f"{at}[{place}]") for place, call in enumerate(several)]
    else:
        several, calls = values, [read_call(values[0], at)]
    if not calls:
        raise BadRecord(f"{at} holds no call")
    if len(pieces) == 1 and all(isinstance(call["arguments"], dict) for call in several):
        return pieces[0].strip(), before
    return as_json(calls, at), before


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_call(call: Any, at: str) -> dict[str, Any]:
    """A tool call with its arguments as an object; OpenAI writes them as JSON text, which is empty where there are none."""
    name = call.get("name") if isinstance(call, Mapping) else None
    if not isinstance(name, str) or not name or "arguments" not in call:
        raise BadRecord(f"{at} should be a call, an object with 'name' and 'arguments'")
    arguments = call["arguments"]
    if isinstance(arguments, str):
        arguments = read_json(arguments, f"{at}.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise BadRecord(f"{at}.arguments should be an object, found {kind_of(arguments)}")
    return {"name": name, "arguments": arguments}


def _take_results_off(messages: list[Message]) -> int:
    """Remove tools' results at the end; returns how many there were."""
    size = len(messages)
    while messages and messages[-1].role == "observation":
        messages.pop()
    return size - len(messages)
