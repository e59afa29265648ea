"""What a model wrote, read back: its thought, its text and its calls, as the message that stands in the conversation from then on."""

from __future__ import annotations

import json

from finery.data.dialects import DIALECTS
from finery.data.dialects.base import Call, Dialect, dump, read_tools
from finery.data.sample import BadRecord, Message, Sample
from finery.data.template import Template

_PROBE = Call("look", {"at": "it"})
_TOOLS = [{"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}]
_WRITTEN = {"name": _PROBE.name, "arguments": _PROBE.arguments}


def dialect_of(template: Template) -> Dialect | None:
    """How a template calls tools: a named one says so, of the model's own a call is rendered and read; nothing where none can."""
    if template.chosen_dialect is not None:
        return template.chosen_dialect
    sample = Sample((Message("user", "Look."), Message("function", dump(_WRITTEN))), tools=json.dumps(_TOOLS))
    try:
        written = _without_end(template, str(template.tokenizer.decode(template.encode(sample)[0][-1].target)))
    except BadRecord:
        return None
    found = [dialect for name in DIALECTS.names() if _reads(dialect := DIALECTS[name](), written)]
    return next((dialect for dialect in found if dialect.write([_PROBE]).strip() in written), found[0] if found else None)


def _without_end(template: Template, text: str) -> str:
    for word in template.tokenizer.convert_ids_to_tokens(sorted(template.stop_ids)):
        text = text.removesuffix(str(word))
    return text


def _reads(dialect: Dialect, written: str) -> bool:
    parsed = dialect.parse(written, _TOOLS)
    return parsed is not None and parsed[1] == [_PROBE]


def read_answer(template: Template, dialect: Dialect | None, text: str, tools: str) -> Message:
    """An answer that was decoded with its special tokens; one that calls tools is a `function` message."""
    text = _without_end(template, text)
    if dialect is None or not tools:
        return Message("assistant", text)
    opening, closing = (word.strip() for word in template.thought_words)
    at, mark = text.find(closing), dialect.opening.search(text)
    thinks = at >= 0 and (mark is None or at < mark.start() or text.lstrip().startswith(opening))
    thought, closed, rest = text.partition(closing) if thinks else ("", "", text)
    parsed = dialect.parse(rest, read_tools(tools))
    if parsed is None:
        return Message("assistant", text)
    said, calls = parsed
    written = dump([{"name": call.name, "arguments": call.arguments} for call in calls])
    return Message("function", written, thought.strip().removeprefix(opening).strip() if closed else "", said.strip())
