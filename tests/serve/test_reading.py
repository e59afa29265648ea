"""Answers are read the same in whatever pieces they come, in every dialect; the forms of calls are what dialects write."""

import json
from typing import Any

import pytest

from finery.data.dialects import DIALECTS
from finery.data.dialects.base import Call
from finery.data.reading import Reader
from finery.data.sample import BadRecord
from finery.serve.grammars import Grammars, Start, written_of
from finery.serve.refusals import Refusal
from serving import template_for

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"name": "weather", "description": "The weather.", "parameters": SCHEMA}, {"name": "clock", "parameters": {"type": "object"}}]
CALL = Call("weather", {"city": "Rome", "days": 2})


def read(reader: Reader, pieces: list[str]) -> tuple[str, str, list[Call], list[str]]:
    """Thought, content, calls, and the content as it came."""
    deltas = [*[reader.feed(piece) for piece in pieces], reader.finish()]
    texts = [delta.content for delta in deltas if delta.content]
    return "".join(delta.thought for delta in deltas), "".join(texts), [call for delta in deltas for call in delta.calls], texts


def cuts(text: str) -> list[list[str]]:
    sizes = (1, 2, 3, 7, len(text))
    return [[text[at : at + size] for at in range(0, len(text), size)] for size in sizes]


@pytest.mark.parametrize("thought", ["", "<think>\nI < you </ think>.\n</think>\n\n"])
@pytest.mark.parametrize("name", DIALECTS.names())
def test_every_dialect_in_pieces(name: str, thought: str) -> None:
    dialect = DIALECTS[name]()
    try:
        calls = [CALL, Call("weather", {"city": "Oslo", "days": 3})]
        written = dialect.write(calls)
    except BadRecord:
        calls = [CALL]
        written = dialect.write(calls)
    text = f"{thought}Let me see: 1 < 2.\n{written}"
    for pieces in cuts(text):
        told, content, found, texts = read(Reader("<think>", "</think>", dialect=dialect, tools=TOOLS), pieces)
        assert (told, content, found) == ("I < you </ think>." if thought else "", "Let me see: 1 < 2.", calls)
        assert len(pieces) < 5 or len(texts) > 1, "text before a call is not held back to the end"


@pytest.mark.parametrize("name", DIALECTS.names())
@pytest.mark.parametrize(
    "text", ["Just text.", "  a <b> [c] {d} Action: nothing\n\nweather\n", "<tool_call>", "", "<tool", "{", "[TOOL_CALLS]", "<|"]
)
def test_what_is_no_call_is_text(name: str, text: str) -> None:
    for pieces in cuts(text) if text else [[]]:
        assert read(Reader("<think>", "</think>", dialect=DIALECTS[name](), tools=TOOLS), pieces)[1:3] == (text, [])


@pytest.mark.parametrize(
    ("text", "opened", "thought", "content"),
    [
        ("<think>\na\n</think>\n\nb", False, "a", "b"),
        ("\n<think>a</think>b", False, "a", "b"),
        ("a\n</think>\n\nb", True, "a", "b"),
        ("<think>\na\n</think>\n\nb", True, "a", "b"),
        ("<think>a", False, "a", ""),
        ("a", True, "a", ""),
        ("b <think>a</think>", False, "", "b <think>a</think>"),
        ("<thinking>", False, "", "<thinking>"),
        ("<think></think>b", False, "", "b"),
        ("  b", False, "", "  b"),
        ("<thi", False, "", "<thi"),
        ("a </think", True, "a </think", ""),
    ],
)
def test_thoughts(text: str, opened: bool, thought: str, content: str) -> None:
    for pieces in cuts(text):
        assert read(Reader("<think>\n", "\n</think>\n\n", opened), pieces)[:2] == (thought, content)


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, template_for(tokenizer, "qwen3").stop_ids)


def fits(grammars: Grammars, form: Any, text: str) -> bool:
    """Whether a form lets a text be written, token by token, and end."""
    for token in grammars.tokenizer(text, add_special_tokens=False)["input_ids"]:  # type: ignore[union-attr]
        allowed = form.allowed()
        if allowed is not None and token not in allowed:
            return False
        form.take(token)
    allowed = form.allowed()
    return allowed is None or bool(set(allowed.tolist()) & set(grammars.stop_ids))


@pytest.mark.parametrize("name", DIALECTS.names())
def test_forms_of_calls_are_what_a_dialect_writes(name: str, grammars: Grammars) -> None:
    dialect = DIALECTS[name]()
    how = written_of(dialect)
    if how is None:
        assert name in ("gemma4", "glm4_moe", "lfm2", "minimax2", "qwen3_5", "seed_oss"), "arguments that are no JSON"
        return
    functions = [(str(tool["name"]), dict(tool["parameters"])) for tool in TOOLS]  # type: ignore[call-overload]
    make = grammars.calls(functions, how, True, Start())
    written = dialect.write([CALL]).lstrip()
    assert fits(grammars, make(), written) and fits(grammars, make(), dialect.write([Call("clock", {})]).lstrip())
    assert not fits(grammars, make(), written.replace("weather", "whether"))
    assert not fits(grammars, make(), written.replace("days", "nights"))
    assert not fits(grammars, make(), written[:-3])
    if how.joint is not None:
        assert fits(grammars, make(), dialect.write([CALL, CALL]).lstrip())
    assert not how.joint or not fits(grammars, grammars.calls(functions, how, False, Start())(), dialect.write([CALL, CALL]).lstrip())


def test_a_form_after_something(grammars: Grammars) -> None:
    text = json.dumps({"city": "Rome", "days": 2})
    for after, opening in ((Start("</think>"), "hm {} </think>\n\n"), (Start("</think>"), "</think>"), (Start("!?"), "a!?b!?"[:3])):
        make = grammars.schema(SCHEMA, "response_format", after)
        assert fits(grammars, make(), opening + text)
        assert not fits(grammars, make(), opening + text.replace("days", "nights"))
    think = grammars.tokenizer.convert_tokens_to_ids("<think>")
    make = grammars.schema(SCHEMA, "response_format", Start(thought=(int(think), "</think>")))  # type: ignore[arg-type]
    assert fits(grammars, make(), text) and fits(grammars, make(), f"<think>so</think>\n{text}")
    assert not fits(grammars, make(), f"<think>so</think>\n{text[1:]}") and not fits(grammars, make(), f"so{text}")


def test_forms_are_apart(grammars: Grammars) -> None:
    make = grammars.schema(SCHEMA, "response_format", Start())
    one, other = make(), make()
    one.take(int(one.allowed()[0]))  # type: ignore[index]
    assert fits(grammars, other, '{"city": "Rome", "days": 2}')


def test_what_no_form_can_hold(grammars: Grammars) -> None:
    with pytest.raises(Refusal, match="cannot be held to"):
        grammars.schema({"not": {"type": "string"}}, "response_format", Start())
    with pytest.raises(Refusal, match="65,536 characters"):
        grammars.schema({"enum": ["a" * 70_000]}, "response_format", Start())
