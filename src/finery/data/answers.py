"""Which dialect the answers of a template call tools in."""

from __future__ import annotations

import json

from finery.data.dialects import DIALECTS
from finery.data.dialects.base import Call, Dialect, dump
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
        written = str(template.tokenizer.decode(template.encode(sample)[0][-1].target))
    except BadRecord:
        return None
    for word in template.tokenizer.convert_ids_to_tokens(sorted(template.stop_ids)):
        written = written.removesuffix(str(word))
    found = [dialect for name in DIALECTS.names() if _reads(dialect := DIALECTS[name](), written)]
    return next((dialect for dialect in found if dialect.write([_PROBE]).strip() in written), found[0] if found else None)


def _reads(dialect: Dialect, written: str) -> bool:
    parsed = dialect.parse(written, _TOOLS)
    return parsed is not None and parsed[1] == [_PROBE]
