"""Tool dialects in Jinja, as a saved template has them: they write what the dialects write, byte by byte."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from drawn_calls import some_calls, some_text, some_tools, some_value
from finery.data.dialects import DIALECTS
from finery.data.dialects.base import Call, Dialect, jinja_string, read_tools

NAMES = DIALECTS.names()
ONE_CALL = {"glm4"}
ANY_KEY = {"default", "gemma4", "glm4", "ling", "llama3", "minimax1", "mistral", "qwen"}
TEXT_TOO = ANY_KEY - {"gemma4"}
ASKING = "[{{ tools_of(tools) }}]\n[{{ calls_of(messages[0]['tool_calls']) if messages[0]['tool_calls'] is defined }}]"
Render = Callable[[Dialect, Any, Any], str]


def transformers(dialect: Dialect, tools: Any, tool_calls: Any) -> str:
    """Both texts, as `apply_chat_template` renders them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template(
        [[{"role": "assistant", "tool_calls": tool_calls}]], tools=tools, chat_template=dialect.macros + ASKING
    )
    return text


def plain_jinja(dialect: Dialect, tools: Any, tool_calls: Any) -> str:
    """Both texts, by an environment that trims nothing by itself and knows no more than servers' do."""
    from jinja2 import Environment

    environment = Environment(keep_trailing_newline=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(dialect.macros + ASKING).render(messages=[{"tool_calls": tool_calls}], tools=tools)


def asked(call: Call) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def in_openai(call: Call) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": asked(call)}


def drawn_calls(draw: random.Random, name: str) -> list[Call]:
    calls, _ = some_calls(draw, 1 if name in ONE_CALL else draw.randint(1, 3))
    if name in ANY_KEY:
        calls[0].arguments.update({some_text(draw): some_value(draw) for _ in range(draw.randrange(3))})
    return calls


@pytest.mark.parametrize("render", [transformers, plain_jinja])
@pytest.mark.parametrize("name", NAMES)
def test_macros_write_what_the_dialect_writes(name: str, render: Render) -> None:
    draw, dialect = random.Random(f"macros of {name}"), DIALECTS[name]()
    for _ in range(200):
        tools = read_tools(json.dumps(some_tools(draw, draw.randrange(4))))
        calls = drawn_calls(draw, name)
        text = render(dialect, tools, [draw.choice((asked, in_openai))(call) for call in calls])
        assert text == f"[{dialect.describe(tools)}]\n[{dialect.write(calls)}]"


@pytest.mark.parametrize("name", NAMES)
def test_items_of_several_types(name: str) -> None:
    """Rarely drawn."""
    items = {"type": ["string", "null"], "X-unit": "km", "enum": ["a", "b"]}
    tools = [{"name": "f", "parameters": {"properties": {"k": {"type": "array", "items": items}}}}]
    call = Call("f", {"k": ["a", None]})
    text = transformers(DIALECTS[name](), tools, [asked(call)])
    assert text == f"[{DIALECTS[name]().describe(tools)}]\n[{DIALECTS[name]().write([call])}]"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_call_and_no_arguments(name: str) -> None:
    dialect = DIALECTS[name]()
    calls = [] if name not in ONE_CALL else [Call("f", {})]
    for arguments in ({}, None):
        assert transformers(dialect, [], [{"name": "f", "arguments": arguments}]).endswith(f"\n[{dialect.write([Call('f', {})])}]")
    assert transformers(dialect, [], list(map(asked, calls))) == f"[{dialect.describe([])}]\n[{dialect.write(calls)}]"


@pytest.mark.parametrize("name", sorted(TEXT_TOO))
def test_arguments_may_be_json_text(name: str) -> None:
    """Some programs hand them on as OpenAI's protocol has them."""
    dialect, call = DIALECTS[name](), Call("f", {"a": ['"é\n', 1.5, None]})
    for text in (json.dumps(call.arguments, ensure_ascii=False), "", " "):
        expected = dialect.write([call if text.strip() else Call("f", {})])
        assert transformers(dialect, [], [{"function": {"name": "f", "arguments": text}}]).endswith(f"\n[{expected}]")


@pytest.mark.parametrize("name", sorted(set(NAMES) - TEXT_TOO))
def test_arguments_as_text_are_refused_where_each_stands_alone(name: str) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match=r"has no attribute 'items'|should be an object"):
        transformers(DIALECTS[name](), [], [{"name": "f", "arguments": '{"a": 1}'}])


@pytest.mark.parametrize("name", sorted(ONE_CALL))
@pytest.mark.parametrize("num_calls", [0, 2])
def test_several_calls_are_refused_for_the_same_reason(name: str, num_calls: int) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match=f"this tool format has one call a turn, found {num_calls}"):
        transformers(DIALECTS[name](), [], [asked(Call("f", {}))] * num_calls)


@pytest.mark.parametrize("name", NAMES)
def test_macros_write_nothing_by_themselves(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template([[]], chat_template=DIALECTS[name]().macros + "{{ 'x' }}\n ")
    assert text == "x\n "


def test_text_is_quoted() -> None:
    from jinja2 import Environment

    for text in ("it's", "\\'", "\\n", "\n\r\n", "{{ a }} {% b %} {# c #}", "-}}", '"', "é你😀", ""):
        assert Environment().from_string("{{ " + jinja_string(text) + " }}").render() == text
