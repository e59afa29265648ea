"""What a data format is: a reader of one record."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from finery.data.sample import BadRecord, Sample

MEDIA = ("images", "videos", "audios")
PLACEHOLDERS = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}
"""What stands in a text where a medium belongs."""
PAIR = ("chosen", "rejected")
SHARED = ("system", "tools", *MEDIA, *PAIR, "kto_tag")
"""Roles of columns that every format of conversations reads."""


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
    """Reads records of one shape.

    What an entry of the registry leaves out is as `default_columns` and `default_tags` say; an entry with
    `ranking: true` has the columns `chosen` and `rejected` unless it names others.
    """

    reads: tuple[str, ...] = ()  # the columns that this format looks at, by their role
    default_columns = Columns()
    default_tags = Tags()

    def __init__(self, columns: Columns, tags: Tags, ranking: bool = False) -> None:
        self.ranking = ranking
        self.columns = _over(self.default_columns, columns)
        self.tags = _over(self.default_tags, tags)
        if ranking:
            wanted = {role: getattr(self.columns, role) or role for role in PAIR}
            self.columns = self.columns.model_copy(update=wanted)
        named = {role: str(column) for role in columns.model_fields_set if (column := getattr(columns, role))}
        looked_at = {role for role in self.reads if ranking or role not in PAIR}
        self.asked = {role: column for role, column in named.items() if role in looked_at}
        """The columns that the entry itself names, by role; one that is in no record is probably misspelt."""
        self.unread = {role: column for role, column in named.items() if role not in looked_at}
        """The columns that the entry names in vain: this format does not look at them."""
        self._media = {role: str(column) for role in MEDIA if (column := getattr(self.columns, role))}

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> Sample:
        """The sample of one record; raises `BadRecord`."""

    def where(self, record: Mapping[str, Any], number: int) -> str:
        """The path of a sample's message inside its record, of which `read` has made the sample."""
        return f"message {number}"

    def text(self, record: Mapping[str, Any], column: str | None) -> str:
        """A column as text; a column that is not there, or null, is empty."""
        value = record.get(column) if column else None
        if value is None:
            return ""
        return value if type(value) is str and value.isascii() else as_text(value, repr(column))

    def shared(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What every format reads alike: tools, media, and whether the answer is one to learn."""
        columns = self.columns
        facts: dict[str, Any] = {role: _several(record.get(column), column) for role, column in self._media.items()}
        if columns.tools:
            facts["tools"] = self.tools(record)
        if columns.kto_tag:
            facts["desirable"] = as_flag(record.get(columns.kto_tag), repr(columns.kto_tag))
        return facts

    def tools(self, record: Mapping[str, Any]) -> str:
        """The tools column as JSON text, whether it was written as text or as a list."""
        column = self.columns.tools
        value = record.get(column) if column else None
        if isinstance(value, (list, dict)):
            tools, text = value, as_json(value, repr(column))
        else:
            text = self.text(record, column)
            tools = read_json(text, repr(column)) if text.strip() else None
        if not tools:
            return ""
        if not isinstance(tools, (list, dict)):
            raise BadRecord(f"{column!r} should be a list of function schemas, found {kind_of(tools)}")
        for place, tool in enumerate(tools if isinstance(tools, list) else [tools]):
            schema = (tool.get("function") or tool) if isinstance(tool, Mapping) else None
            if not isinstance(schema, Mapping) or not isinstance(schema.get("name"), str):
                raise BadRecord(f"{column!r}[{place}] should be a function schema, an object with 'name', 'description' and 'parameters'")
        return text


def kind_of(value: Any) -> str:
    """What a value is called in a complaint."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity"
    return "nothing" if value is None else type(value).__name__


def as_text(value: Any, at: str) -> str:
    """A value that should be text, and such as can be written as UTF-8; `at` is its path inside the record."""
    if not isinstance(value, str):
        raise BadRecord(f"{at} should be text, found {kind_of(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecord(f"{at} has a broken character (a lone surrogate)") from None
    return value


def as_flag(value: Any, at: str) -> bool:
    """A value that should be true or false."""
    if not isinstance(value, bool):
        raise BadRecord(f"{at} should be true or false, found {kind_of(value)}")
    return value


def as_json(value: Any, at: str) -> str:
    """A value as JSON text."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # bytes or times of a parquet file, say
        raise BadRecord(f"{at} cannot be written as JSON: {error}") from None
    return as_text(text, at)


def read_json(text: str, at: str) -> Any:
    """The value of JSON text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"{at} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise BadRecord(f"{at} is not JSON that can be read: {error}") from None
    if "\\u" in text:  # characters may be written as numbers, and broken ones are
        as_json(value, at)
    return value


Shape = TypeVar("Shape", Columns, Tags)


def _over(defaults: Shape, given: Shape) -> Shape:
    """What an entry says itself over what a format expects."""
    return defaults.model_copy(update={name: getattr(given, name) for name in given.model_fields_set})


def _several(value: Any, column: str) -> tuple[Any, ...]:
    """One thing, several or none, as a tuple."""
    if value is None or (isinstance(value, str) and not value):
        return ()
    if not isinstance(value, (list, tuple)):
        return (value,)
    for place, item in enumerate(value):
        if item is None:
            raise BadRecord(f"{column!r}[{place}] is null")
    return tuple(value)
