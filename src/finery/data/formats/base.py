"""What a data format is: a reader of one record."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from finery.data.sample import BadRecord, Message


class Columns(BaseModel):
    """Which column of a record plays which role. What a registry entry leaves out keeps its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None


class Tags(BaseModel):
    """How messages inside a record name their fields and roles. What is left out keeps its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


class Format(ABC):
    """Reads records of one shape."""

    def __init__(self, columns: Columns, tags: Tags) -> None:
        self.columns = columns
        self.tags = tags

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> tuple[list[Message], str, str]:
        """Messages, system text and tools of one record; raises `BadRecord`."""

    def text(self, record: Mapping[str, Any], column: str | None) -> str:
        """A column as text; a column that is not there, or null, is empty."""
        value = record.get(column) if column else None
        if value is None:
            return ""
        if not isinstance(value, str):
            raise BadRecord(f"{column!r} should be text, found {type(value).__name__}")
        return value

    def tools(self, record: Mapping[str, Any]) -> str:
        """The tools column as JSON text, whether it was written as text or as a list."""
        import json

        value = record.get(self.columns.tools) if self.columns.tools else None
        if isinstance(value, (list, dict)):
            return json.dumps(value, ensure_ascii=False) if value else ""
        text = self.text(record, self.columns.tools)
        try:
            tools = json.loads(text) if text.strip() else None
        except json.JSONDecodeError as error:
            raise BadRecord(f"{self.columns.tools!r} is not JSON: {error.msg}") from None
        if tools and not isinstance(tools, (list, dict)):
            raise BadRecord(f"{self.columns.tools!r} should be a list of function schemas")
        return text if tools else ""
