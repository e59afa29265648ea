"""Talks as files: JSON in the shape of OpenAI's messages, which data sets of the format `openai` have, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finery.data.dialects.base import dump
from finery.data.formats.base import as_text, kind_of
from finery.data.formats.openai import OpenAI
from finery.data.messages import as_dicts, as_schemas, with_call_ids
from finery.data.sample import BadRecord, Message
from finery.errors import UserError
from finery.files import replace_text
from finery.talks.talk import Talk


def as_record(talk: Talk) -> dict[str, Any]:
    """A talk as OpenAI's clients would send it: arguments are JSON text, and results name their call."""
    messages = with_call_ids(as_dicts(talk.messages, talk.system))
    for function in (call["function"] for message in messages for call in message.get("tool_calls", ())):
        function["arguments"] = dump(function["arguments"])
    tools = as_schemas(talk.tools)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def from_record(record: Any) -> Talk:
    """A talk of an object with `messages`, or of the list of them alone; raises `BadRecord`."""
    record = {"messages": record} if isinstance(record, list) else record
    if not isinstance(record, dict) or not isinstance(entries := record.get("messages"), list):
        found = ", ".join(map(repr, list(record)[:5])) if isinstance(record, dict) else kind_of(record)
        raise BadRecord(f"should hold a list of 'messages', found {found or 'nothing'}")
    reads = OpenAI(OpenAI.default_columns.model_copy(update={"tools": "tools"}), OpenAI.default_tags)
    talk = Talk(tools=reads.tools(record))
    for place, entry in enumerate(_in_order(entries)):
        at, media = f"'messages'[{place}]", {}
        message = reads.message(entry, at, media)
        if media:
            raise BadRecord(f"{at} holds {', '.join(media)}: only texts can be talked about")
        if message.role == "system" and not place:
            talk.system = message.content
        elif _fits(talk, message):
            talk.messages.append(message)
        else:
            raise BadRecord(f"{at} is of role {entry['role']!r}, which cannot stand there")
    return talk


def _fits(talk: Talk, message: Message) -> bool:
    """Whether a message can come next."""
    if message.role == "observation":
        return bool(talk.owed)
    if message.role == "user":
        return not talk.due and not talk.owed
    return message.role != "system" and talk.due


def _in_order(entries: list[Any]) -> list[Any]:
    """Results in the order of their calls, by which alone they are told apart from here on."""
    found: list[Any] = []
    ids: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict) and isinstance(calls := entry.get("tool_calls"), list):
            ids = [call.get("id") for call in calls if isinstance(call, dict)]
        results = [id for id in ids if id is not None]
        place = len(found)
        while isinstance(entry, dict) and (mine := entry.get("tool_call_id")) in results and place:
            other = found[place - 1].get("tool_call_id") if isinstance(found[place - 1], dict) else None
            if other not in results or results.index(other) < results.index(mine):
                break
            place -= 1
        found.insert(place, entry)
    return found


def save(talk: Talk, path: Path) -> None:
    """Write a talk; raises `UserError` where that cannot be, or where the file holds something else."""
    if path.exists():
        try:
            load(path)
        except UserError:
            raise UserError(f"{path} is there and holds no conversation: name another file") from None
    try:
        replace_text(path, json.dumps(as_record(talk), ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def load(path: Path) -> Talk:
    """Read a talk; raises `UserError` where it is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return from_record(json.loads(as_text(text, str(path))))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    except BadRecord as error:
        raise UserError(f"{path}: {error}") from None
