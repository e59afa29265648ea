"""OpenAI: messages as chat APIs exchange them, with tool calls, reasoning and content in parts."""

from collections.abc import Mapping
from typing import Any

from finery.data.formats.base import PLACEHOLDERS, SHARED, Columns, Tags, as_json, as_text, kind_of
from finery.data.formats.sharegpt import Found, Placed, ShareGPT, read_call, split_calls
from finery.data.sample import BadRecord, Message, Role

__all__ = ["OpenAI"]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TEXTS = ("text", "input_text", "output_text")
PARTS = {f"{kind}{end}": f"{kind}s" for kind in ("image", "video", "audio") for end in ("", "_url")} | {
    "input_image": "images",
    "input_audio": "audios",
}
"""Types of parts that are no text, and the column whose things they are."""


class OpenAI(ShareGPT):
    """Column messages, and tools where the entry names no columns; a response column may hold the last turns, as TRL's `completion`."""

    reads = ("messages", "response", *SHARED)
    default_columns = Columns(messages="messages", response=None)
    default_tags = Tags(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant", observation_tag="tool")
    results_in_a_row = True

    def __init__(self, columns: Columns, tags: Tags, ranking: bool = False) -> None:
        super().__init__(columns, tags, ranking)
        if not columns.model_fields_set:
            self.columns = self.columns.model_copy(update={"tools": "tools"})

    def role_words(self) -> dict[str, Role]:
        """Older and newer names of roles beside those of the tags."""
        return {"developer": "system", "function": "observation", **super().role_words()}

    def messages_column(self, record: Mapping[str, Any]) -> str | None:
        """The reference calls it `conversations` where the entry does not say."""
        column = self.columns.messages
        return "conversations" if column not in record and "messages" not in self.asked and "conversations" in record else column

    def entries(self, record: Mapping[str, Any]) -> Placed:
        """The messages, and those of the response column."""
        placed, column = super().entries(record), self.columns.response
        response = record.get(column) if column else None
        return placed if response is None or column is None else placed + self.answers(response, column)

    def message(self, entry: Any, at: str, inside: Found) -> Message:
        """Calls make a function turn of an assistant's; what it says beside them stands apart."""
        role = self.role(entry, at)
        calls = self._calls(entry, at)
        empty = (calls or role == "observation") and entry.get(self.tags.content_tag) is None
        content = "" if empty else self._content(entry, at, inside)
        thought = next((value for key in THOUGHTS if (value := entry.get(key))), "")
        if (calls or thought) and role not in ("assistant", "function"):
            raise BadRecord(f"{at} is of role {entry[self.tags.role_tag]!r}, but only an assistant calls tools and thinks")
        thought = thought and as_text(thought, f"the reasoning of {at}")
        train = self.learnt(entry, role, at)
        if calls:
            return Message("function", calls, thought, content, train)
        if role == "function":
            content, before = split_calls(content, f"{at}.{self.tags.content_tag}")
            return Message(role, content, thought, before, train)
        return Message(role, content, thought, train=train)

    def learnt(self, entry: Mapping[str, Any], role: Role, at: str) -> bool | None:
        """`train`, or the `weight` of OpenAI's fine-tuning files."""
        weight = entry.get("weight")
        if weight is None or entry.get("train") is not None:
            return super().learnt(entry, role, at)
        if weight not in (0, 1):
            raise BadRecord(f"{at}.weight should be 0 or 1, found {str(weight)[:20]!r}")
        return super().learnt({"train": bool(weight)}, role, at)

    def _calls(self, entry: Mapping[str, Any], at: str) -> str:
        """The tool calls of a message as a JSON list; empty where there are none."""
        if calls := entry.get("tool_calls"):
            if not isinstance(calls, list):
                raise BadRecord(f"{at}.tool_calls should be a list, found {kind_of(calls)}")
            named = []
            for place, call in enumerate(calls):
                path, inner = f"{at}.tool_calls[{place}]", call.get("function") if isinstance(call, Mapping) else None
                named.append((f"{path}.function", inner) if inner else (path, call))
        elif call := entry.get("function_call"):
            named = [(f"{at}.function_call", call)]
        else:
            return ""
        return as_json([read_call(call, path) for path, call in named], named[0][0])

    def _content(self, entry: Mapping[str, Any], at: str, inside: Found) -> str:
        parts = entry.get(self.tags.content_tag)
        if not isinstance(parts, (list, tuple)):
            return self.content(entry, at)
        return "".join(_part(part, f"{at}.{self.tags.content_tag}[{place}]", inside, self.columns) for place, part in enumerate(parts))


def _part(part: Any, at: str, inside: Found, columns: Columns) -> str:
    """The text of a part of a message; a medium is added to `inside` and leaves its placeholder."""
    if isinstance(part, str):
        return as_text(part, at)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in TEXTS:
        return as_text(part.get("text"), f"{at}.text")
    if not isinstance(kind, str) or kind not in PARTS:
        raise BadRecord(f"{at} should be a part with a 'type' of {', '.join(('text', *PARTS))}, found {str(kind)[:40]!r}")
    column = PARTS[kind]
    medium = next((value for key in (kind, "url", "path", column[:-1], f"{column[:-1]}_url") if (value := part.get(key))), None)
    if isinstance(medium, Mapping) and medium.get("url"):
        medium = medium["url"]
    elif isinstance(medium, Mapping) and isinstance(medium.get("data"), str):
        medium = f"data:{column[:-1]}/{medium.get('format') or 'wav'};base64,{medium['data']}"
    if medium is not None:
        inside.setdefault(column, []).append(medium)
    elif not getattr(columns, column):  # else it stands there
        raise BadRecord(f"{at} is of type {kind!r} and has no source")
    return PLACEHOLDERS[column]
