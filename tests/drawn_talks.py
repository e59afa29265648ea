"""Conversations drawn by hypothesis: what users' data hold, and what is hard on templates."""

import json
from typing import Any

from hypothesis import strategies as st

from finery.data.sample import Message, Sample

PLAIN = ["Hello.", "What is it?", "It is 3 degrees.", "你是谁？", "naïve café", "a\n\nb", "print('x')\n", "1 2  3", "", " ", "{{ x }}"]
HARD = [
    *(" lead", "trail ", "\n\nboth\n\n", "one\r\ntwo\r\n", "\ttab", "👩‍👩‍👧 🙂", "שלום\u200f", "e\u0301", "\u00a0"),
    *("{% if %}", "</s>", "[INST]", "<think>", "</think>", "###", "<b>x</b>"),
]
CITIES = ["Rome", "Oslo", "São Paulo", "東京"]


@st.composite
def texts(draw: Any, special: list[str]) -> str:
    """Pieces of plain, hard and arbitrary text, and now and then the words of special tokens."""
    arbitrary = st.text(st.characters(codec="utf-8", exclude_characters="\x00\ufdd0\ufdd1\ufdd2"), max_size=8)
    pieces = st.one_of(st.sampled_from(PLAIN), st.sampled_from(HARD), arbitrary, st.sampled_from(special or PLAIN))
    return draw(st.sampled_from(["", " "])).join(draw(st.lists(pieces, min_size=1, max_size=4)))


@st.composite
def tools(draw: Any) -> str:
    """One or two function schemas, bare or wrapped."""
    schemas = [
        {
            "name": name,
            "description": draw(st.sampled_from(["Looks it up.", "天气。", 'Says "hi".'])),
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]},
        }
        for name in draw(st.sampled_from([["weather"], ["weather", "look_up"]]))
    ]
    return json.dumps([{"type": "function", "function": schema} for schema in schemas] if draw(st.booleans()) else schemas)


@st.composite
def calls(draw: Any) -> list[Message]:
    """A turn with one or two calls, and their results."""
    made = [{"name": "weather", "arguments": {"city": city}} for city in draw(st.lists(st.sampled_from(CITIES), min_size=1, max_size=2))]
    before = draw(st.sampled_from(["", "", "Let me see."]))
    turn = Message("function", json.dumps(made if len(made) > 1 else made[0], ensure_ascii=False), before_calls=before)
    return [turn, *(Message("observation", draw(st.sampled_from(["3", '{"degrees": -8}', "No.\n"]))) for _ in made)]


@st.composite
def talks(draw: Any, special: list[str]) -> Sample:
    """One to four rounds; with tools in a third of them, with thoughts in a third, some answers only read."""
    kind = draw(st.sampled_from(["plain", "tools", "thoughts"]))
    messages: list[Message] = []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(texts(special))))
        if kind == "tools" and draw(st.booleans()):
            messages += draw(calls())
        thought = draw(st.sampled_from(["", "Hm.", "Well,\nlet me think."])) if kind == "thoughts" else ""
        answer = draw(texts(special))
        apart = draw(st.booleans())
        content = f"<think>\n{thought}\n</think>\n\n{answer}" if thought and not apart else answer
        train = draw(st.sampled_from([None, None, None, False]))
        messages.append(Message("assistant", content, thought if apart else "", train=train))
    system = draw(st.one_of(st.just(""), texts(special)))
    return Sample(tuple(messages), system, draw(tools()) if kind == "tools" else "")
