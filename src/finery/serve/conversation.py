"""A request's messages as the conversation that templates know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finery.data.dialects.base import dump
from finery.data.sample import Message
from finery.serve.protocol import ChatMessage, Part, ToolCall
from finery.serve.refusals import bad

_FIELDS = {
    "system": set(),
    "developer": set(),
    "user": set(),
    "assistant": {"tool_calls", "reasoning_content"},
    "tool": {"tool_call_id", "name"},
}
"""What a role has beside its content."""


def conversation(messages: Sequence[ChatMessage]) -> tuple[str, list[Message]]:
    """The system text, and the messages after it; raises `Refusal` where they are in no order that can be answered."""
    for at, message in enumerate(messages):
        _look_at_fields(message, f"messages[{at}]")
    num_system = next((at for at, message in enumerate(messages) if message.role not in ("system", "developer")), len(messages))
    system = "\n\n".join(_text(message, f"messages[{at}]") for at, message in enumerate(messages[:num_system]))
    found: list[Message] = []
    at = num_system
    while at < len(messages):
        message, place = messages[at], f"messages[{at}]"
        if message.role in ("system", "developer"):
            raise bad(f"A {message.role} message may only stand before all others.", place)
        if message.role == "tool":
            raise bad("A tool message must follow the assistant message that has its call in 'tool_calls'.", place)
        if message.tool_calls:
            found.append(_calling(message, place))
            results = _results(messages, at)
            found += results
            at += len(results)
        elif message.role == "assistant":
            found.append(Message("assistant", _text(message, place), message.reasoning_content or ""))
        else:
            found.append(Message("user", _text(message, place)))
        at += 1
    if not found or found[-1].role not in ("user", "observation"):
        raise bad("The last message must be a user's or a tool's: there is nothing to answer otherwise.", "messages")
    return system, found


def _look_at_fields(message: ChatMessage, place: str) -> None:
    if message.role == "function":
        raise bad("The role 'function' is an old one: use 'tool' with a 'tool_call_id'.", f"{place}.role")
    for field in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        if getattr(message, field) is not None and field not in _FIELDS[message.role]:
            raise bad(f"'{field}' is not supported in a message of the role '{message.role}'.", f"{place}.{field}", "unsupported_parameter")


def _text(message: ChatMessage, place: str) -> str:
    """The text of a message, whose parts are put together."""
    if message.content is None:
        raise bad(f"The content of a {message.role} message must be a text.", f"{place}.content")
    if isinstance(message.content, str):
        return message.content
    if not message.content:
        raise bad("A list of parts must hold at least one.", f"{place}.content")
    return "".join(_part(part, f"{place}.content[{at}]") for at, part in enumerate(message.content))


def _part(part: Part, place: str) -> str:
    if part.type != "text":
        media = "Images, audio, video and files are not supported by this server, which fetches and opens nothing that a request names"
        raise bad(f"{media}: a part must be of the type 'text', found {part.type[:40]!r}.", f"{place}.type", "unsupported_content")
    if part.text is None:
        raise bad("A part of the type 'text' must hold a 'text'.", f"{place}.text")
    if part.model_extra:
        field = next(iter(part.model_extra))
        raise bad(f"Unknown parameter: '{place}.{field}'.", f"{place}.{field}", "unknown_parameter")
    return part.text


def _calling(message: ChatMessage, place: str) -> Message:
    """An assistant's calls, with what it said before them."""
    calls = [_call(call, f"{place}.tool_calls[{at}]") for at, call in enumerate(message.tool_calls or [])]
    said = _text(message, place) if message.content else ""
    return Message("function", dump(calls), message.reasoning_content or "", said)


def _call(call: ToolCall, place: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad("The arguments of a call must be a JSON object, as text.", f"{place}.function.arguments")
    return {"name": call.function.name, "arguments": arguments}


def _results(messages: Sequence[ChatMessage], at: int) -> list[Message]:
    """What the tools said to the calls of `messages[at]`, in the order of the calls: templates tell them apart by that alone."""
    calls = messages[at].tool_calls or []
    names = {call.id: call.function.name for call in calls}
    if len(names) < len(calls):
        raise bad("Two calls of one message have the same id.", f"messages[{at}].tool_calls")
    results: dict[str, Message] = {}
    for place in range(at + 1, len(messages)):
        message, told = messages[place], f"messages[{place}]"
        if message.role != "tool":
            break
        if message.tool_call_id not in names:
            raise bad("'tool_call_id' must be the id of a call in the assistant message before.", f"{told}.tool_call_id")
        if message.tool_call_id in results:
            raise bad("There are two results of one call.", f"{told}.tool_call_id")
        if message.name not in (None, names[message.tool_call_id]):
            raise bad("'name' must be that of the function that was called, or be left out.", f"{told}.name")
        results[message.tool_call_id] = Message("observation", _text(message, told))
    missing = [id for id in names if id not in results]
    if missing:
        raise bad(f"Every call must be followed by a tool message with its result; missing: {', '.join(missing)}.", f"messages[{at}]")
    return [results[id] for id in names]
