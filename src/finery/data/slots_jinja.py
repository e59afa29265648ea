"""A named template written as Jinja, for programs that read a saved model's `chat_template.jinja`.

It writes what `SlotTemplate` lays out: the same pieces in the same order, as one text.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finery.data.dialects.base import jinja_string
from finery.data.slots import CONTENT, special_of, token_text
from finery.data.template import FOLDER

if TYPE_CHECKING:
    from finery.data.slots import SlotTemplate


def written(template: "SlotTemplate") -> str:
    """The whole template, a statement a line."""
    slots = template.slots
    lines = [
        _said_of(slots.name),
        _TEXT_OF,
        *_thinking(template),
        template.dialect.macros,
        *_opening(template),
        "{%- for message in messages -%}",
    ]
    user, tool = (_slot(template, slots.of_role(role)) for role in ("user", "observation"))
    lines += [
        "{%- if message['role'] == 'user' -%}",
        "{%- set content = state.within + text_of(message['content']) -%}{%- set state.within = '' -%}"
        if slots.system_in_question
        else "{%- set content = text_of(message['content']) -%}",
        user,
        "{%- elif message['role'] == 'tool' -%}{%- set content = text_of(message['content']) -%}",
        tool,
        "{%- elif message['role'] == 'assistant' -%}",
        *_answer(template),
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    if template.thinking is not None:
        empty = jinja_string(template.thinking.empty)
        lines.append(
            f"{{%- if add_generation_prompt and not thinks and messages[-1]['role'] != 'assistant' -%}}{{{{- {empty} -}}}}{{%- endif -%}}"
        )
    return "\n".join(line for line in lines if line)


def _said_of(name: str) -> str:
    """A comment that says what the template is, see `named_in`; a user's own file cannot be found by its name."""
    return f"{{#- Finery: template {name} -#}}" if (FOLDER / f"{name}.yaml").is_file() else ""


def named_in(jinja: object) -> str | None:
    """The name of the template that a saved Jinja template says it was made of."""
    found = re.match(r"\{#- Finery: template ([\w.-]+) -#\}", jinja) if isinstance(jinja, str) else None
    return found[1] if found and (FOLDER / f"{found[1]}.yaml").is_file() else None


_TEXT_OF = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content -%}{%- for part in content -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}"""


def _thinking(template: "SlotTemplate") -> list[str]:
    """Whether the model is to think, and how thoughts are taken out of a text."""
    thinking = template.thinking
    if thinking is None:
        return []
    default = {True: "true", False: "false", None: "none"}[thinking.enabled]
    opening, closing = jinja_string(thinking.opening), jinja_string(thinking.closing)
    return [
        f"{{%- set thinks = enable_thinking if enable_thinking is defined else {default} -%}}",
        "{%- macro without_thoughts(text) -%}",
        f"{{%- set parts = text.split({opening}) -%}}{{{{- parts[0] -}}}}",
        "{%- for part in parts[1:] -%}",
        f"{{{{- part.split({closing}, 1)[1] if {closing} in part else {opening} + part -}}}}",
        "{%- endfor -%}",
        "{%- endmacro -%}",
    ]


def _opening(template: "SlotTemplate") -> list[str]:
    """What stands before the first turn."""
    slots = template.slots
    described = "tools_of(tools)"
    if slots.tools is not None:
        described = f"{jinja_string(slots.tools)}.replace({jinja_string(CONTENT)}, bare_tools(tools))"
    if slots.strip_tools:
        described = f"({described} if system else ({described}).lstrip('\\n'))"
    system = "{%- set system = text_of(messages[0]['content']) if messages and messages[0]['role'] == 'system' else '' -%}"
    default = f"{{%- set system = system or {jinja_string(slots.default_system)} -%}}" if slots.default_system else ""
    first = _slot(template, slots.system[:1] if slots.system_in_question else slots.system)
    shown = f"{{%- set state.within -%}}{first}{{%- endset -%}}" if slots.system_in_question else first
    return [
        _slot(template, slots.prefix),
        "{%- set state = namespace(within='') -%}" if slots.system_in_question else "",
        system,
        default,
        f"{{%- set content = system + ({described} if tools else '') -%}}",
        f"{{%- if content -%}}{shown}{{%- endif -%}}",
    ]


def _answer(template: "SlotTemplate") -> list[str]:
    """An answer with its thought and its calls."""
    slots = template.slots
    opening, closing = (jinja_string(word) for word in slots.thought_words)
    bare_opening, bare_closing = (jinja_string(word.strip()) for word in slots.thought_words)
    lines = [
        "{%- set content = text_of(message['content']) -%}",
        "{%- if message['tool_calls'] -%}",
        f"{{%- set joined = not content or content.endswith('\\n') or content.endswith({bare_closing}) -%}}",
        "{%- set apart = '' if joined else '\\n' -%}",
        "{%- set content = content + apart + calls_of(message['tool_calls']) -%}",
        "{%- endif -%}",
        "{%- if message['reasoning_content'] -%}",
        f"{{%- set content = {opening} + message['reasoning_content'] + {closing} + content -%}}",
        "{%- endif -%}",
    ]
    thinking = template.thinking
    if thinking is not None:
        past = "not loop.last" if thinking.strip_history else "false"
        asked = "thinks == false or" if thinking.enabled is False else ""  # whatever words are left
        stripped = "past" if thinking.enabled is None else "thinks == false or past"  # else the data decide
        lines += [
            f"{{%- set past = {past} -%}}",
            f"{{%- if {stripped} -%}}{{%- set content = without_thoughts(content).lstrip('\\n') -%}}{{%- endif -%}}",
            f"{{%- if not past and ({asked} {bare_opening} not in content and {bare_closing} not in content) -%}}"
            f"{{{{- {jinja_string(thinking.empty)} -}}}}{{%- endif -%}}",
        ]
    called, said = (_slot(template, slots.of_role(role)) for role in ("function", "assistant"))
    if called == said:
        return [*lines, said]
    return [*lines, "{%- if message['tool_calls'] -%}", called, "{%- else -%}", said, "{%- endif -%}"]


def _slot(template: "SlotTemplate", slot: Sequence[str]) -> str:
    """A slot around the variable `content`."""
    texts = []
    for piece in slot:
        if (special := special_of(piece)) is not None:
            texts.append(jinja_string(token_text(template.tokenizer, special)))
        else:
            before, found, after = piece.partition(CONTENT)
            texts += [jinja_string(before), *(["content"] if found else []), jinja_string(after)]
    shown = " + ".join(text for text in texts if text != "''")
    return f"{{{{- {shown} -}}}}" if shown else ""
