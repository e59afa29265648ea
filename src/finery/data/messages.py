"""Conversations as chat templates read them: dicts in which tool calls and tool results have roles of their own."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finery.data.dialects.base import read_calls, read_tools, wrapped
from finery.data.sample import BadRecord, Message


def as_dicts(
    messages: Sequence[Message], system: str = "", thoughts_apart: bool = True, drop_thoughts: bool = False
) -> list[dict[str, Any]]:
    """Messages after a system text; thoughts stand apart as `reasoning_content`, or before the answers in the usual words."""
    found: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for given in messages:
        message = _without_thought(given) if drop_thoughts else given
        if message.role == "function":
            said = replace(message, content=message.before_calls)
            content = said.content if thoughts_apart else _with_thought(said)
            found.append({"role": "assistant", "content": content, "tool_calls": _calls(message.content)})
        elif message.role == "observation":
            found.append({"role": "tool", "content": message.content})
        else:
            found.append({"role": message.role, "content": message.content if thoughts_apart else _with_thought(message)})
        if message.thought and thoughts_apart:
            found[-1]["reasoning_content"] = message.thought
    return found


def with_call_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls and results have ids, for templates that refuse them without: nine digits, which all take."""
    found, number, open_ids = [], 0, []
    for message in messages:
        if "tool_calls" in message:
            ids = [f"{number + place:09}" for place in range(1, len(message["tool_calls"]) + 1)]
            number, open_ids = number + len(ids), list(ids)
            message = {**message, "tool_calls": [{"id": id, **call} for id, call in zip(ids, message["tool_calls"], strict=True)]}
        elif message["role"] == "tool":
            message = {**message, "tool_call_id": open_ids.pop(0) if open_ids else f"{number:09}"}
        found.append(message)
    return found


def as_schemas(tools: str) -> list[Any] | None:
    """Function schemas from their JSON text, each wrapped as OpenAI does; raises `BadRecord`."""
    return [wrapped(tool) for tool in read_tools(tools)] or None


def _with_thought(message: Message) -> str:
    """A message's text, with the thought that the data keep apart before it, as most reasoning models write it."""
    return f"<think>\n{message.thought}\n</think>\n\n{message.content}" if message.thought else message.content


def _without_thought(message: Message) -> Message:
    content = re.sub(r"<think>.*?</think>\s*", "", message.content, flags=re.DOTALL) if message.role == "assistant" else message.content
    return replace(message, thought="", content=content)


def _calls(text: str) -> list[dict[str, Any]]:
    try:
        calls = read_calls(text)
    except BadRecord:
        raise BadRecord("a function call should be JSON with 'name' and 'arguments'") from None
    return [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
