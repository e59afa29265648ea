"""Which format records have, told by the names of their columns and by what stands in them."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finery.data.formats import FORMATS
from finery.data.formats.base import MEDIA, kind_of
from finery.errors import UserError

FILE = "dataset_info.json"
NUM_LOOKED_AT = 100
"""How many records tell the format."""
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input")
INPUTS = ("input", "context")
"""What an instruction may be about."""
ANSWERS = ("output", "response", "completion", "answer", "solution")
TEXTS = ("text", "content")
TEXT = ("text", "JSON")
"""The shapes that a text has."""
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "prompt")
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
BESIDE = {  # by role of the column: its usual names, and the shapes that it has
    "system": (("system", "system_prompt"), TEXT),
    "history": (("history",), ("pairs",)),
    "tools": (("tools", "functions"), ("list", "dict", "JSON")),
    "images": (("images", "image"), ("text", "list", "dict")),
    "videos": (("videos", "video"), ("text", "list", "pairs", "dict")),
    "audios": (("audios", "audio"), ("text", "list", "dict")),
    "kto_tag": (("kto_tag", "label"), ("bool",)),
}
WORDS = {  # what data sets call the roles of messages
    "user_tag": ("user", "human", "prompter"),
    "assistant_tag": ("assistant", "gpt", "chatgpt", "bot", "model"),
    "observation_tag": ("observation", "tool", "tool_response", "function_response", "ipython"),
    "function_tag": ("function_call", "tool_call"),
    "system_tag": ("system",),
}
SAID = {
    "messages": "messages",
    "prompt": "questions",
    "query": "what they are about",
    "response": "answers",
    "history": "earlier turns",
    "system": "system texts",
    "kto_tag": "whether an answer is a good one",
    "chosen": "better answers",
    "rejected": "worse answers",
}


@dataclass
class _Guess:
    """An entry of the registry that grows; `columns` maps roles to columns."""

    formatting: str
    columns: dict[str, str | None]
    tags: dict[str, str] = field(default_factory=dict)
    ranking: bool = False


class _Table:
    """What stands in the columns of the first records."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.records = records
        names = dict.fromkeys(name for record in records for name in record)
        self.shapes = {str(name): _usual(self.values(name)) for name in names}

    def values(self, column: str) -> Iterator[Any]:
        """All that a column holds, apart from nulls."""
        return (value for record in self.records if (value := record.get(column)) is not None)

    def find(self, names: Sequence[str], *shapes: str) -> str | None:
        """The first column of one of these names and shapes; capitals do not count."""
        known = {column.lower(): column for column, shape in self.shapes.items() if shape in shapes}
        return next((known[name] for name in names if name in known), None)


def detect(records: Sequence[Any]) -> tuple[dict[str, Any], str]:
    """What an entry of the registry would say of such records, and a sentence for the user.

    The entry has the keys `formatting`, `columns`, `tags` and `ranking`. Raises `UserError` where no format fits.
    """
    looked_at = records[:NUM_LOOKED_AT]
    if not looked_at:
        raise UserError("the format cannot be told: there is no record")
    if strange := [kind_of(record) for record in looked_at if not isinstance(record, Mapping)]:
        raise UserError(f"the format cannot be told: records should be objects with named columns, found {strange[0]}")
    table = _Table(looked_at)
    guess = _pairs(table) or _conversation(table) or _answers(table) or _text(table) or _questions(table)
    if guess is None:
        raise UserError(_told(table))
    used = {column for column in guess.columns.values() if column}
    named = [f"{SAID.get(role, role)} in column {column!r}" for role, column in guess.columns.items() if column]
    prompt = guess.columns.get("prompt")
    if prompt and not guess.ranking and not guess.columns["response"]:
        named[0] = f"{'plain text' if prompt.lower() in TEXTS else 'questions without answers'} in column {prompt!r}"
    unread = [repr(column) for column in table.shapes if column not in used]
    said = f"read as {guess.formatting}: {', '.join(named)}" + (f"; nothing reads {', '.join(unread)}" if unread else "")
    return {"formatting": guess.formatting, "columns": guess.columns, "tags": guess.tags, "ranking": guess.ranking}, said


def _pairs(table: _Table) -> _Guess | None:
    """A better and a worse answer: texts, messages, or whole conversations."""
    shapes = (*TEXT, "message", "messages")
    chosen, rejected = table.find(("chosen",), *shapes), table.find(("rejected",), *shapes)
    if not chosen or not rejected:
        return None
    answers: dict[str, str | None] = {"chosen": chosen, "rejected": rejected}
    asked = table.find(CONVERSATIONS, "messages")
    guess = _with_messages(table, asked) if asked else None
    question, value = table.find(QUESTIONS, *TEXT), next(table.values(chosen))
    if isinstance(value, str) and question and not guess:
        return _Guess("alpaca", _asked(table, question) | answers | _beside(table, "system", "history", "tools", *MEDIA), ranking=True)
    if isinstance(value, (list, tuple)) and len(value) > 1:
        guess = _with_messages(table, chosen)
        guess.columns["messages"] = None  # both sides begin with the whole conversation
    if guess:
        guess.columns = {role: column for role, column in guess.columns.items() if role != "kto_tag"} | answers
        guess.ranking = True
    return guess


def _conversation(table: _Table) -> _Guess | None:
    """Messages under a usual name, or in the only column that holds any."""
    holding = [column for column, shape in table.shapes.items() if shape == "messages"]
    column = table.find(CONVERSATIONS, "messages") or (holding[0] if len(holding) == 1 else None)
    if not column:
        return None
    answer = table.find(ANSWERS, *TEXT, "message", "messages") if column.lower() == "prompt" else None
    guess = _with_messages(table, column, answered_apart=bool(answer))
    if answer:
        guess.columns["response"] = answer
    return guess


def _with_messages(table: _Table, column: str, answered_apart: bool = False) -> _Guess:
    """The format of a column of messages, with the tags that differ from what the format expects."""
    messages = [message for value in table.values(column) for message in _as_messages(value)]
    role_key, content_key = next(keys for message in messages if (keys := _keys(message)))
    rich = answered_apart or any(message.get("tool_calls") for message in messages)
    formatting = "sharegpt" if (role_key, content_key) == ("from", "value") and not rich else "openai"
    expected = FORMATS[formatting].default_tags
    tags = {"role_tag": role_key, "content_tag": content_key}
    words = Counter(str(message.get(role_key)) for message in messages)
    for tag, known in WORDS.items():
        seen = sorted((word for word in known if word in words), key=lambda word: -words[word])
        if seen and getattr(expected, tag) not in seen:
            tags[tag] = seen[0]
    tags = {tag: word for tag, word in tags.items() if getattr(expected, tag) != word}
    columns: dict[str, str | None] = {"messages": column}
    return _Guess(formatting, columns | _beside(table, "system", "tools", *MEDIA, "kto_tag"), tags)


def _answers(table: _Table) -> _Guess | None:
    """Questions and answers as texts."""
    question = table.find(QUESTIONS, *TEXT)
    answer = table.find(ANSWERS, *TEXT)
    if not question or not answer:
        return None
    return _Guess("alpaca", _asked(table, question) | {"response": answer} | _beside(table, *BESIDE))


def _text(table: _Table) -> _Guess | None:
    """Plain text."""
    column = table.find(TEXTS, *TEXT)
    return _Guess("alpaca", {"prompt": column, "query": None, "response": None}) if column else None


def _questions(table: _Table) -> _Guess | None:
    """Questions alone, for stages that write the answers themselves; other texts might be answers under a name of their own."""
    question = table.find(QUESTIONS, *TEXT)
    if not question:
        return None
    columns = _asked(table, question) | {"response": None} | _beside(table, "system", "tools", *MEDIA)
    others = [column for column, shape in table.shapes.items() if shape in TEXT and column not in columns.values()]
    return None if others and question.lower() != "prompt" else _Guess("alpaca", columns)


def _asked(table: _Table, question: str) -> dict[str, str | None]:
    query = table.find(INPUTS, *TEXT) if question.lower() == "instruction" else None
    return {"prompt": question, "query": query}


def _beside(table: _Table, *roles: str) -> dict[str, str | None]:
    """Columns beside the conversation."""
    return {role: column for role in roles if (column := table.find(BESIDE[role][0], *BESIDE[role][1]))}


def _usual(values: Iterator[Any]) -> str:
    """The shape that most values have."""
    counts = Counter(_shape(value) for value in values)
    return counts.most_common(1)[0][0] if counts else "nothing"


def _shape(value: Any) -> str:
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("[", "{"):
            return "text"
        return "messages" if _as_messages(value) else "JSON" if _parsed(value) is not None else "text"
    if isinstance(value, Mapping):
        return "message" if _keys(value) else "dict"
    if not isinstance(value, (list, tuple)):
        return kind_of(value)
    if _as_messages(value):
        return "messages"
    return "pairs" if value and all(isinstance(item, (list, tuple)) for item in value) else "list"


def _as_messages(value: Any) -> list[Mapping[str, Any]]:
    """The messages of a list, which may be written as JSON; none where it holds others."""
    value = _parsed(value) if isinstance(value, str) else value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value) and _keys(value[0]):
        return list(value)
    return []


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _keys(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a message calls its role and its content, if it is one."""
    role = next((key for key in ROLE_KEYS if isinstance(message.get(key), str)), None)
    content = next((key for key in CONTENT_KEYS if key in message), None)
    return (role, content) if role and content else None


def _told(table: _Table) -> str:
    """Why no format fits, and what would do."""
    columns = [f"{name!r} ({shape})" for name, shape in table.shapes.items()]
    found = ", ".join(columns[:12]) + (", …" if len(columns) > 12 else "") if columns else "none"
    ways = "'instruction' and 'output', 'messages', 'text', or a question with 'chosen' and 'rejected'"
    return f"the format cannot be told from the columns {found}; rename them to {ways}, or say what they are under 'columns' in {FILE}"
