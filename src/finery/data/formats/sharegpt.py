"""ShareGPT: a list of messages, each with a role and a text under names that `tags` may change."""

from collections.abc import Mapping
from typing import Any

from finery.data.formats.base import Format
from finery.data.sample import BadRecord, Message, Role

__all__ = ["ShareGPT"]


class ShareGPT(Format):
    """Columns messages, system, tools; a leading system message wins over the column."""

    def read(self, record: Mapping[str, Any]) -> tuple[list[Message], str, str]:
        """Turns alternate: user or observation, then assistant or function call."""
        raw = record.get(self.columns.messages) if self.columns.messages else None
        if not isinstance(raw, list) or not raw:
            raise BadRecord(f"{self.columns.messages!r} should be a list of messages")
        messages = [self._message(entry) for entry in raw]
        system = self.text(record, self.columns.system)
        if messages[0].role == "system":
            system = messages.pop(0).content
        for place, message in enumerate(messages):
            allowed = ("user", "observation") if place % 2 == 0 else ("assistant", "function")
            if message.role not in allowed:
                raise BadRecord(f"message {place} is of role {message.role!r} where {' or '.join(allowed)} is due")
        if not messages or len(messages) % 2:
            raise BadRecord("the conversation does not end with an answer")
        return messages, system, self.tools(record)

    def _message(self, entry: Any) -> Message:
        tags = self.tags
        roles: dict[str, Role] = {
            tags.system_tag: "system",
            tags.function_tag: "function",
            tags.observation_tag: "observation",
            tags.assistant_tag: "assistant",
            tags.user_tag: "user",
        }
        if not isinstance(entry, Mapping) or tags.role_tag not in entry or tags.content_tag not in entry:
            raise BadRecord(f"a message should have {tags.role_tag!r} and {tags.content_tag!r}, found {str(entry)[:60]!r}")
        role, content = entry[tags.role_tag], entry[tags.content_tag]
        if not isinstance(role, str) or role not in roles:
            raise BadRecord(f"unknown role {role!r}; the tags name {', '.join(roles)}")
        if not isinstance(content, str):
            raise BadRecord(f"a message's {tags.content_tag!r} should be text, found {type(content).__name__}")
        return Message(roles[role], content)
