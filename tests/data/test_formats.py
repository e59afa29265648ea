"""Records of every format become messages, and what cannot become any says why."""

import json
from pathlib import Path
from typing import Any

import pytest

from finery.data.formats import FORMATS
from finery.data.formats.base import Columns, Format, Tags
from finery.data.records import read_records
from finery.data.registry import PACKAGED, find_entry, read_registry
from finery.data.sample import BadRecord


def make(name: str, columns: dict[str, Any] | None = None, tags: dict[str, Any] | None = None) -> Format:
    """A format as a registry entry would make it."""
    return FORMATS[name](Columns(**columns or {}), Tags(**tags or {}))


def pairs(form: Format, record: dict[str, Any]) -> list[tuple[str, str]]:
    """Roles and texts of a record."""
    return [(message.role, message.content) for message in form.read(record)[0]]


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"instruction": "Add", "input": "1 2"}, "Add\n1 2"),
        ({"instruction": "Add", "input": ""}, "Add"),
        ({"instruction": "Add", "input": None}, "Add"),
        ({"instruction": "Add"}, "Add"),
        ({"instruction": "", "input": "1 2"}, "1 2"),
        ({"instruction": " Add ", "input": "\n1"}, " Add \n\n1"),
    ],
)
def test_alpaca_joins_prompt_and_query(record: dict[str, Any], question: str) -> None:
    assert pairs(make("alpaca"), record | {"output": "3"}) == [("user", question), ("assistant", "3")]


def test_alpaca_history_system_and_tools() -> None:
    form = make("alpaca", {"history": "past", "system": "sys", "tools": "t"})
    record = {"instruction": "c", "output": "d", "past": [["a", "b"], ("a2", "b2")], "sys": "Be terse.", "t": [{"name": "f"}]}
    messages, system, tools = form.read(record)
    assert [message.content for message in messages] == ["a", "b", "a2", "b2", "c", "d"]
    assert [message.role for message in messages] == ["user", "assistant"] * 3
    assert system == "Be terse."
    assert json.loads(tools) == [{"name": "f"}]


def test_alpaca_history_may_be_absent_or_null() -> None:
    form = make("alpaca", {"history": "past", "system": "sys"})
    for extra in ({}, {"past": None, "sys": None}, {"past": []}):
        messages, system, _ = form.read({"instruction": "a", "output": "b"} | extra)
        assert (len(messages), system) == (2, "")


def test_alpaca_keeps_an_empty_answer() -> None:
    assert pairs(make("alpaca"), {"instruction": "a", "output": ""})[-1] == ("assistant", "")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "", "input": "", "output": "b"}, "question is empty"),
        ({"output": "b"}, "question is empty"),
        ({"instruction": "a"}, "'output' should be text, found nothing"),
        ({"instruction": "a", "output": None}, "'output' should be text, found nothing"),
        ({"instruction": "a", "output": 4}, "'output' should be text, found int"),
        ({"instruction": ["a"], "output": "b"}, "'instruction' should be text, found list"),
        ({"instruction": "a", "input": 4, "output": "b"}, "'input' should be text, found int"),
        ({"instruction": "a", "output": "b", "past": [["one"]]}, "'past' should hold pairs"),
        ({"instruction": "a", "output": "b", "past": [["one", None]]}, "'past' should hold pairs"),
        ({"instruction": "a", "output": "b", "t": "{"}, "'t' is not JSON"),
        ({"instruction": "a", "output": "b", "t": "5"}, "'t' should be a list of function schemas"),
        ({"instruction": "a", "output": "b", "sys": 5}, "'sys' should be text, found int"),
    ],
)
def test_alpaca_says_why_a_record_is_bad(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        make("alpaca", {"history": "past", "tools": "t", "system": "sys"}).read(record)


@pytest.mark.parametrize("value", ["", " ", "[]", None, []])
def test_no_tools_in_every_spelling(value: Any) -> None:
    assert make("alpaca", {"tools": "t"}).read({"instruction": "a", "output": "b", "t": value})[2] == ""


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


ROUND = (("human", "a"), ("gpt", "b"))


def test_sharegpt_leading_system_message_wins_over_the_column() -> None:
    form = make("sharegpt", {"system": "sys"})
    record = {"conversations": talk(("system", "inner"), *ROUND), "sys": "outer"}
    messages, system, _ = form.read(record)
    assert (len(messages), system) == (2, "inner")
    assert form.read({"conversations": talk(*ROUND), "sys": "outer"})[1] == "outer"


def test_sharegpt_calls_and_observations() -> None:
    turns = talk(("human", "a"), ("function_call", "{}"), ("observation", "o"), ("gpt", "b"))
    assert [role for role, _ in pairs(make("sharegpt"), {"conversations": turns})] == ["user", "function", "observation", "assistant"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (talk(("gpt", "b"), ("human", "a")), "message 0 is of role 'assistant'"),
        (talk(*ROUND, ("gpt", "b"), ("human", "a")), "message 2 is of role 'assistant'"),
        (talk(("human", "a"), ("observation", "o")), "message 1 is of role 'observation'"),
        (talk(*ROUND, ("system", "late"), ("gpt", "b")), "message 2 is of role 'system'"),
        (talk(("human", "a")), "does not end with an answer"),
        (talk(*ROUND, ("human", "a")), "does not end with an answer"),
        (talk(("system", "s")), "does not end with an answer"),
        (talk(("narrator", "a"), ("gpt", "b")), "unknown role 'narrator'"),
        ([{"from": ["human"], "value": "a"}], "unknown role"),
        ([{"role": "user", "content": "a"}], "should have 'from' and 'value'"),
        ([{"from": "human", "value": None}, {"from": "gpt", "value": "b"}], "should be text, found NoneType"),
        (["hello"], "should have 'from' and 'value'"),
        ([], "should be a list of messages"),
        (None, "should be a list of messages"),
        ("hello", "should be a list of messages"),
    ],
)
def test_sharegpt_says_why_a_record_is_bad(messages: Any, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        make("sharegpt").read({"conversations": messages})


def test_partial_columns_keep_defaults() -> None:
    """Where the reference takes every column that is left out for absent."""
    form = make("alpaca", {"prompt": "q", "system": "sys"})
    assert pairs(form, {"q": "a", "input": "more", "output": "b"}) == [("user", "a\nmore"), ("assistant", "b")]
    form = make("sharegpt", {"tools": "t"})
    assert len(pairs(form, {"conversations": talk(*ROUND), "t": ""})) == 2


def test_partial_tags_keep_defaults() -> None:
    """Where the reference drops a sample with a system message, or crashes."""
    form = make("sharegpt", {}, {"user_tag": "user", "assistant_tag": "assistant"})
    record = {"conversations": talk(("system", "s"), ("user", "a"), ("assistant", "b"))}
    assert form.read(record)[1] == "s"
    assert pairs(form, record) == [("user", "a"), ("assistant", "b")]


def test_openai_style_tags() -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    form = make("sharegpt", {"messages": "messages"}, tags)
    assert form.read({"messages": messages})[1] == "s"
    assert pairs(form, {"messages": messages}) == [("user", "u"), ("assistant", "a")] * 2


def read_all(folder: Path, name: str) -> int:
    """How many records a set holds; every one must be read."""
    entries, _ = read_registry(str(folder))
    entry = find_entry(name, entries)
    form = FORMATS[entry.formatting](entry.columns, entry.tags)
    records = read_records(folder / str(entry.file_name), entry, None)
    for record in records:
        assert form.read(record)[0]
    return len(records)


@pytest.mark.parametrize(
    ("name", "count"), [("identity", 91), ("alpaca_en_demo", 999), ("alpaca_zh_demo", 1000), ("glaive_toolcall_en_demo", 300)]
)
def test_real_sets_are_read_without_loss(shared: Path, name: str, count: int) -> None:
    assert read_all(shared / "data", name) == count


@pytest.mark.parametrize("name", sorted(json.loads((PACKAGED / "dataset_info.json").read_text(encoding="utf-8"))))
def test_packaged_sets_are_read_without_loss(name: str) -> None:
    assert read_all(PACKAGED, name) > 0
