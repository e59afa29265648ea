"""Tools and their calls drawn at random, of text that tool dialects and JSON trip over."""

import random
from typing import Any

from finery.data.dialects.base import Call

PIECES = [
    *("<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "<function=f>", "</function>", "<parameter=k>", "</parameter>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", '<invoke name="f">', "</invoke>", '<parameter name="k">', '<|"|>'),
    *("<minimax:tool_call>", "</minimax:tool_call>", "<seed:tool_call>", "</seed:tool_call>", "<|tool_call>call:f{", "<tool_call|>"),
    *(
        "<|tool_call_start|>[",
        "]<|tool_call_end|>",
        "[TOOL_CALLS]",
        "Action: f\nAction Input: {}",
        "find\n{}",
        '{"name": "f", "arguments": {}}',
    ),
    *(
        "\n</parameter>\n<parameter=k>\n",
        "5",
        "-1.5e3",
        "007",
        "true",
        "None",
        "NaN",
        "{}",
        '["x"]',
        '"q"',
        '"',
        "'",
        "\\",
        "\\n",
        "\\u003c",
    ),
    *(
        '"\\u003c"',
        " ",
        "\n",
        "\r\n",
        "\t",
        "é你😀",
        "\u2028",
        "\x00",
        "<",
        ">",
        "|",
        ",",
        ":",
        "=",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "plain",
        "a b",
    ),
]


def some_text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.choice((0, 1, 1, 2, 3, 5))))


def some_value(draw: random.Random, depth: int = 3) -> Any:
    kind = draw.randrange(8 if depth else 6)
    if kind < 2:
        return some_text(draw)
    if kind == 6:
        return [some_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        return {some_text(draw): some_value(draw, depth - 1) for _ in range(draw.randrange(4))}
    return [draw.randrange(-(10**20), 10**20), draw.random() * 10.0 ** draw.randrange(-30, 30), draw.choice((True, False)), None][kind - 2]


def some_name(draw: random.Random) -> str:
    return "".join(draw.choices("abzAZ019_.-", k=draw.randint(1, 12)))


KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}


def some_calls(draw: random.Random, num_calls: int) -> tuple[list[Call], list[dict[str, Any]]]:
    """Calls, and the tools whose schemas fit them."""
    calls = [Call(some_name(draw), {some_name(draw): some_value(draw) for _ in range(draw.randrange(5))}) for _ in range(num_calls)]
    calls = list({call.name: call for call in calls}.values())
    schemas = [{key: {"type": KINDS[type(value)]} for key, value in call.arguments.items()} for call in calls]
    return calls, [{"name": call.name, "parameters": {"properties": schema}} for call, schema in zip(calls, schemas, strict=True)]


def some_schema(draw: random.Random, depth: int = 3) -> Any:
    """A parameter's schema: sound, or odd in a key or two."""
    kinds = ["string", "integer", "number", "boolean", "array", "object", "Array", "OBJECT", ["string", "null"], None]
    found: dict[str, Any] = {
        "type": draw.choice(kinds),
        "description": draw.choice((some_text(draw), "What <it> is", None)),
        "enum": draw.choice(([some_value(draw, 1) for _ in range(draw.randrange(4))], "a", 5)),
        "nullable": draw.choice((True, False)),
        "default": some_value(draw),
        "X-unit": "km",  # sorts elsewhere where case counts
        "items": some_schema(draw, depth - 1) if depth else draw.choice(({}, None, "x")),
        **some_object(draw, depth - 1),
    }
    return {key: found[key] for key in draw.sample(list(found), draw.randint(1, len(found)))} if draw.random() < 0.95 else some_value(draw)


def some_object(draw: random.Random, depth: int) -> dict[str, Any]:
    properties = {draw.choice((some_name, some_text))(draw): some_schema(draw, depth) for _ in range(draw.randrange(5) if depth > 0 else 0)}
    required = draw.sample(list(properties), draw.randint(0, len(properties)))
    return {"properties": draw.choice((properties, properties, properties, 5)), "required": draw.choice((required, required, True, None))}


def some_tools(draw: random.Random, num_tools: int) -> list[dict[str, Any]]:
    """Function schemas, some of them wrapped as OpenAI does."""
    tools = []
    for _ in range(num_tools):
        parameters = draw.choice(({"type": "object", **some_object(draw, 3)}, some_object(draw, 3), {}, None))
        found = {"name": some_name(draw), "description": draw.choice((some_text(draw), None)), "parameters": parameters, "strict": True}
        bare = {"name": found["name"], **{key: found[key] for key in draw.sample(list(found), 3)}}
        tools.append(draw.choice((bare, {"type": "function", "function": bare})))
    return tools
