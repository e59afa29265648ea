"""Tool dialects: the reference's renderings, the vendors' templates, and whether each reads what it writes."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drawn_calls import PIECES, some_calls, some_text
from finery.data.dialects import DIALECTS
from finery.data.dialects.base import Call, Dialect, read_calls, read_tools
from finery.data.sample import BadRecord

NAMES = DIALECTS.names()
ONE_CALL = {"glm4"}
IN_TAGS = {"glm4_moe", "minimax2", "qwen3_5", "seed_oss"}
OSLO = Call("find_train", {"city": "Oslo", "seats": 2})
ROME = Call("find_train", {"city": "Rome", "seats": 1})

# what is written otherwise than the reference does, as the modules say
MENDED: dict[str, Callable[[str], str]] = {
    "glm4_moe": lambda text: text.replace("\n\n", "\n</tool_call>\n") + "\n</tool_call>",
    "minimax2": lambda text: f"\n<minimax:tool_call>\n{text}\n</minimax:tool_call>",
    "seed_oss": lambda text: text.replace("<function=find_train", "<function=find_train>").replace("\n\n", "\n"),
}


def dialect(name: str) -> Dialect:
    return DIALECTS[name]()


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "reference" / "tool_formats.json").read_text(encoding="utf-8"))


def test_all_of_the_reference_are_there(reference: dict[str, Any]) -> None:
    assert set(NAMES) == reference["formats"].keys()


@pytest.mark.parametrize("name", NAMES)
def test_tools_are_described_as_the_reference_does(reference: dict[str, Any], name: str) -> None:
    tools, expected = reference["tool"], reference["formats"][name]
    date = "02 Jan 2026" if "Date" in expected["describe"] else None
    assert dialect(name).describe(tools, date) == expected["describe"]
    wrapped = [{"type": "function", "function": tool} for tool in tools]
    alike = expected["describe_wrapped_equal"] or name == "seed_oss"  # which writes them as given there
    assert (dialect(name).describe(wrapped, date) == expected["describe"]) is alike


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_written_and_read_as_the_reference_does(reference: dict[str, Any], name: str) -> None:
    expected, mend = reference["formats"][name], MENDED.get(name, str)
    for key, calls in (("call_one", [OSLO]), ("call_two", [OSLO, ROME])):
        if name in ONE_CALL and len(calls) > 1:
            with pytest.raises(BadRecord, match="one call a turn, found 2"):
                dialect(name).write(calls)
        else:
            assert dialect(name).write(calls) == mend(expected[key])
            for tools in ((), reference["tool"]):
                assert dialect(name).parse(expected[key], tools) == ("", calls)
                assert dialect(name).parse(mend(expected[key]), tools) == ("", calls)


def test_no_day_is_made_up() -> None:
    tool = {"name": "look"}
    assert "Date" not in dialect("llama3").describe([tool])
    assert dialect("llama3").describe([tool], "1 May 2025").startswith("Cutting Knowledge Date: December 2023\nToday Date: 1 May 2025\n\n")
    assert all("2025" not in dialect(name).describe([tool], "1 May 2025") for name in NAMES if name != "llama3")


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Arrival city", "enum": ["Oslo", "Rome"]},
        "Days": {"type": "array", "description": "Which", "items": {"type": "string", "enum": ["Mo", "Tu"]}},
        "who": {"type": "object", "properties": {"seats": {"type": "integer"}, "age": {"type": "number"}}, "required": ["age"]},
        "legs": {"type": "array", "items": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]}},
        "back": {"type": "boolean", "nullable": True},
    },
    "required": ["city"],
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "find_train", "description": "Look up trains", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop", "description": "Say <stop>", "parameters": {"type": "object", "properties": {}}}},
]
BOTH = [Call("find_train", {"city": "Oslo\n", "seats": 2}), Call("stop", {})]
NESTED = [Call("find_train", {"who": {"seats": 1, "age": 1.5}, "back": True, "Days": ["Mo", None], "city": "Zürich"}), Call("stop", {})]
VENDORS = [  # template, dialect, what it is to write, whether it describes tools in the same words and order
    ("Qwen-Qwen3-0.6B", "qwen", NESTED, True),
    ("GLM-4.6", "glm4_moe", NESTED, True),
    ("MiniMax-M1", "minimax1", NESTED, False),
    ("MiniMax-M2", "minimax2", NESTED, False),  # the reference has an empty line more
    ("ByteDance-Seed-OSS", "seed_oss", BOTH, False),  # it writes what is no text as Python does
    ("google-gemma-4-31B-it", "gemma4", [Call("find_train", {**NESTED[0].arguments, "Days": ["Mo", "<x>"]}), Call("stop", {})], True),
    ("meta-llama-Llama-3.1-8B-Instruct", "llama3", NESTED[:1], False),
]


@pytest.mark.parametrize(("template", "name", "calls", "described"), VENDORS, ids=[vendor[0] for vendor in VENDORS])
def test_the_vendors_write_the_same(shared: Path, template: str, name: str, calls: list[Call], described: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    jinja = (shared / "vendor" / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    asked = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    messages = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "", "tool_calls": asked}]
    (text,), _ = render_jinja_template([messages], tools=TOOLS, chat_template=jinja, bos_token="")
    assert (written := dialect(name).write(calls)) in text
    assert dialect(name).parse(written, TOOLS) == ("", calls)
    if described:
        assert dialect(name).describe(TOOLS).strip() in text


def same(found: Any, expected: Any) -> bool:
    """Equal in types, too: True is no 1, and 1.0 is none either."""
    return found == expected and repr(found) == repr(expected)


def in_order(calls: list[Call]) -> list[Call]:
    """Keys sorted at every depth, since Gemma sorts them and their order means nothing."""
    return [Call(call.name, json.loads(json.dumps(call.arguments, sort_keys=True))) for call in calls]


BEFORE = ["", "I look it up.", 'He said "<tool_call>" and {"a": 1}, [2] or {x}.', "A line.\n\nAction: 5 > 3", "<|tool_call> {"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_back(name: str) -> None:
    draw = random.Random(f"round trip of {name}")
    for _ in range(400):
        calls, tools = some_calls(draw, 1 if name in ONE_CALL else draw.randint(1, 3))
        text, before = dialect(name).write(calls), draw.choice(BEFORE)
        for shown in (tools,) if name in IN_TAGS else (tools, ()):
            found = dialect(name).parse(f"{before}\n{text}" + draw.choice(("", "\n")), shown)
            assert found is not None, text
            assert found[0] == before
            assert same(in_order(found[1]), in_order(calls)), text


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_answer_makes_nothing_up(name: str) -> None:
    """Every beginning of an answer: no name, no argument and no value that was not meant."""
    draw = random.Random(f"cuts of {name}")
    for _ in range(12):
        calls, tools = some_calls(draw, 1 if name in ONE_CALL else 2)
        text = dialect(name).write(calls)
        for end in range(len(text)):
            _, found = dialect(name).parse(text[:end], tools) or ("", [])
            assert len(found) <= len(calls)
            for read, meant in zip(found, calls, strict=False):
                part = Call(meant.name, {key: meant.arguments[key] for key in read.arguments})
                assert same(in_order([read]), in_order([part]))


CLOSING = {
    "qwen": "\n</tool_call>",
    "ling": "</tool_call>",
    "qwen3_5": "tion>\n</tool_call>",
    "glm4_moe": "</tool_call>",
    "minimax1": "\n</tool_calls>",
    "minimax2": "</minimax:tool_call>",
    "seed_oss": "</function>\n</seed:tool_call>",
    "gemma4": "<tool_call|>",
    "lfm2": "]<|tool_call_end|>",
    "mistral": "]",
}


@pytest.mark.parametrize("name", CLOSING)
def test_the_closing_mark_may_be_missing(name: str) -> None:
    text = dialect(name).write([OSLO, ROME])
    assert text.endswith(CLOSING[name])
    assert dialect(name).parse("Well.\n\n" + text.removesuffix(CLOSING[name])) == ("Well.", [OSLO, ROME])


@pytest.mark.parametrize("name", NAMES)
def test_garbage_is_plain_text(name: str) -> None:
    draw = random.Random(f"garbage for {name}")
    reader, (calls, tools) = dialect(name), some_calls(draw, 1)
    text = reader.write(calls)
    assert reader.parse("") is None
    assert reader.parse("Nothing to call here.\nReally {nothing}.") is None
    for _ in range(500):
        reader.parse("".join(draw.choices(PIECES, k=20)), tools)
        begin = draw.randrange(len(text))
        reader.parse(text[:begin] + some_text(draw) + text[begin + draw.randrange(9) :], tools)
    opening = text[: max(text.find(calls[0].name), 0)]
    for deep in ("[", "{", '{"a":', "[{", "<|tool_call>call:f{a:", "<|tool_call_start|>[f(a=[", "9"):
        for mark in (opening, 'f\n{"a": ', 'Action: f\nAction Input: {"a": ', '{"name": "f", "arguments": {"a": ', "<|tool_call>call:f{a:"):
            reader.parse(mark + deep * 1500, tools)
            reader.parse(mark + deep * 1500 + "}", tools)


def typed(schema: Any, written: str, **parameters: Any) -> Any:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"k": schema}, **parameters}}}]
    found = dialect("seed_oss").parse(f"<function=f><parameter=k>{written}</parameter></function>", tools)
    assert found is not None
    return found[1][0].arguments["k"]


ENUM = {"$defs": {"Unit": {"enum": ["5", "6"]}, "Loop": {"$ref": "#/$defs/Loop"}}}
TYPED = [
    ({"type": "string"}, "5", "5"),
    ({"type": "string"}, "null", "null"),
    ({"type": "string"}, "if </parameter> then", "if </parameter> then"),  # as the vendor's template writes it
    ({"type": "integer"}, " 5\n", 5),
    ({"type": "number"}, "NaN", "NaN"),
    ({"type": "boolean"}, "True", True),
    ({"type": "object"}, '{"a": "5"}', {"a": "5"}),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["string", "null"]}, "5", "5"),
    ({"type": "string", "nullable": True}, "null", None),
    ({"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]}, "[5]", [5]),
    ({"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]}, "5", "5"),
    ({"enum": ["5", "6"]}, "5", "5"),
    ({"const": 5}, "5", 5),
    ({"$ref": "#/$defs/Unit"}, "5", "5"),
    ({"$ref": "#/$defs/Loop"}, "5", 5),
    ({"$ref": "#/nowhere"}, "5", 5),
    ({}, "5", 5),
    ({}, '"5"', '"5"'),
    ({}, "True", "True"),
    (None, "five", "five"),
    ({"type": None, "enum": None, "anyOf": 3}, "5", 5),
]


@pytest.mark.parametrize(("schema", "written", "expected"), TYPED)
def test_the_schema_tells_numbers_from_text(schema: Any, written: str, expected: Any) -> None:
    assert same(typed(schema, written, **ENUM), expected)


def test_python_and_unescaped_quotes_are_read() -> None:
    """Vendors' own templates write such calls of LFM2."""
    text = """<|tool_call_start|>[f(a='it's "so"', b=True, c=None, d={'e': [1, 'x\\ty']}, f="say "hi"\nnow"), g()]<|tool_call_end|>"""
    arguments = {"a": 'it\'s "so"', "b": True, "c": None, "d": {"e": [1, "x\ty"]}, "f": 'say "hi"\nnow'}
    assert dialect("lfm2").parse(text) == ("", [Call("f", arguments), Call("g", {})])


def test_llama_may_say_several_calls_without_a_list() -> None:
    one = '{"name": "f", "parameters": {"a": 1}}'
    assert dialect("llama3").parse(f"<|python_tag|>{one}; {one}") == ("", [Call("f", {"a": 1})] * 2)
    assert dialect("llama3").parse(f"You would write {one} to call it.") is None


def test_prose_of_default_tells_choices() -> None:
    told = dialect("default").describe([{"name": "go", "parameters": SCHEMA}, {"name": "stop"}])
    assert "  - city (string, required): Arrival city, should be one of [Oslo, Rome]\n" in told
    assert "  - Days (array): Which, where each item should be string\n" in told
    assert "Tool Args:\n\nUse the following format" in told
    assert "(one of [go, stop])" in told


@pytest.mark.parametrize("name", sorted(IN_TAGS | {"lfm2"}))
def test_a_key_that_cannot_be_written_is_told(name: str) -> None:
    with pytest.raises(BadRecord, match="has a name that this tool format cannot write"):
        dialect(name).write([Call("f", {'a"></arg_key><arg_value>': 1})])


@pytest.mark.parametrize("name", sorted(IN_TAGS | {"lfm2", "gemma4", "glm4", "default"}))
def test_a_tool_that_cannot_be_written_is_told(name: str) -> None:
    with pytest.raises(BadRecord, match="a tool's name should be letters"):
        dialect(name).write([Call("a tool>", {})])


@pytest.mark.parametrize("name", NAMES)
def test_odd_schemas_are_described(name: str) -> None:
    odd = [
        5,
        {},
        {"enum": 5, "items": 5},
        {"type": "object", "properties": []},
        {"type": ["array"], "items": {"properties": 5, "type": None}},
    ]
    schemas = [{"properties": {"k": each}, "required": True} for each in odd] + [{"properties": 5}, {}, None]
    tools = [{"name": f"tool_{place}", "description": None, "parameters": schema} for place, schema in enumerate(schemas)]
    told = dialect(name).describe(read_tools(json.dumps(tools)))
    assert all(tool["name"] in told for tool in tools)


def test_calls_are_read_in_every_spelling() -> None:
    plain = '{"name": "f", "arguments": {"a": "5"}}'
    text = json.dumps({"name": "f", "arguments": '{"a": "5"}'})
    openai = json.dumps([{"id": "1", "type": "function", "function": json.loads(text)}])
    assert [read_calls(each) for each in (plain, text, openai)] == [[Call("f", {"a": "5"})]] * 3
    assert read_calls('[{"name": "f", "arguments": ""}, {"name": "g", "arguments": null}]') == [Call("f", {}), Call("g", {})]


BAD_CALLS = {
    "f()": "the function call is not JSON",
    "[]": "a function turn should hold a call",
    "[5]": "function call 0 should be a call, an object with 'name' and 'arguments'",
    '[{"name": "f", "arguments": {}}, {"name": "f"}]': "function call 1 should be a call",
    '{"name": "f", "arguments": [1]}': "function call 0.arguments should be an object, found list",
    '{"name": "f", "arguments": "{"}': "function call 0.arguments is not JSON",
}


@pytest.mark.parametrize("text", BAD_CALLS)
def test_a_bad_call_is_told(text: str) -> None:
    with pytest.raises(BadRecord, match=BAD_CALLS[text]):
        read_calls(text)


def test_tools_are_read_bare_or_wrapped() -> None:
    bare = {"name": "f", "parameters": {}}
    assert read_tools(" ") == []
    assert read_tools(json.dumps(bare)) == [bare]
    assert read_tools(json.dumps([bare, {"type": "function", "function": bare}])) == [bare, {"type": "function", "function": bare}]
    for text in ("[5]", '[{"function": 5}]', '[{"description": "x"}]', "{", '{"name": 5}', '{"name": "f", "parameters": 5}'):
        with pytest.raises(BadRecord, match=r"function schema|not JSON|parameters"):
            read_tools(text)
