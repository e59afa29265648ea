"""Messages as chat APIs exchange them become samples, and what cannot become one says why."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finery.data.formats import FORMATS
from finery.data.formats.base import Columns, Format, Tags
from finery.data.sample import BadRecord, Message, Sample


def make(columns: dict[str, Any] | None = None, tags: dict[str, Any] | None = None, ranking: bool = False) -> Format:
    """The format as a registry entry would make it."""
    return FORMATS["openai"](Columns(**columns or {}), Tags(**tags or {}), ranking)


def talk(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def call(name: str, arguments: Any) -> dict[str, Any]:
    """A tool call as the API gives it."""
    return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [call("look", '{"at": "it"}'), call("hear", {"to": "é"})]}
RESULTS = [{"role": "tool", "tool_call_id": f"call_{name}", "content": name} for name in ("look", "hear")]


def read(*messages: Any, **others: Any) -> Sample:
    """The sample of a record in the format's own words."""
    return make().read({"messages": list(messages), **others})


def test_plain_messages_need_neither_columns_nor_tags() -> None:
    sample = read(*talk(("system", " Be terse.\n"), ("user", "a"), ("assistant", "b")))
    assert sample == Sample((Message("user", "a"), Message("assistant", "b")), " Be terse.\n")


@pytest.mark.parametrize("tools", [None, [], [{"type": "function", "function": {"name": "f"}}]])
def test_a_system_text_is_never_rewritten(tools: Any) -> None:
    """The reference appends to it, with and without tools."""
    assert read(ASKED, ANSWERED, tools=tools).system == ""
    assert read(*talk(("developer", "Be terse.")), ASKED, ANSWERED, tools=tools).system == "Be terse."
    assert make({"messages": "messages", "system": "s"}).read({"messages": [ASKED, ANSWERED], "s": "outer"}).system == "outer"


def test_tools_are_read_where_the_entry_names_no_columns() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert json.loads(read(ASKED, ANSWERED, tools=tools).tools) == tools
    assert make({"messages": "messages"}).read({"messages": [ASKED, ANSWERED], "tools": tools}).tools == ""


def test_calls_become_a_function_turn_and_results_stay_apart() -> None:
    sample = read(ASKED, CALLS, *RESULTS, ANSWERED)
    assert [message.role for message in sample.messages] == ["user", "function", "observation", "observation", "assistant"]
    assert [message.content for message in sample.messages[2:4]] == ["look", "hear"]
    calls = '[{"name": "look", "arguments": {"at": "it"}}, {"name": "hear", "arguments": {"to": "é"}}]'
    assert sample.messages[1] == Message("function", calls)


def test_a_tool_may_return_nothing() -> None:
    sample = read(ASKED, CALLS, RESULTS[0] | {"content": None}, {"role": "tool"}, ANSWERED)
    assert [message.content for message in sample.messages[2:]] == ["", "", "b"]


@pytest.mark.parametrize("content", ["I look.", [{"type": "text", "text": "I "}, {"type": "text", "text": "look."}]])
def test_what_is_said_beside_calls_is_kept(content: Any) -> None:
    assert read(ASKED, CALLS | {"content": content}).messages[1].before_calls == "I look."


def test_older_calls_and_results() -> None:
    older = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": ""}}
    sample = read(ASKED, older, {"role": "function", "name": "look", "content": "seen"}, ANSWERED)
    assert sample.messages[1:3] == (Message("function", '[{"name": "look", "arguments": {}}]'), Message("observation", "seen"))


def test_nulls_that_a_table_fills_in_say_nothing() -> None:
    """A parquet file gives every message the columns of all."""
    filled = {"tool_calls": None, "name": None, "reasoning_content": None, "train": None, "weight": None}
    messages = [ASKED | filled, CALLS | {"name": None}, *[result | filled for result in RESULTS], ANSWERED | filled | {"tool_calls": []}]
    assert read(*messages) == read(ASKED, CALLS, *RESULTS, ANSWERED)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stands_apart(key: str) -> None:
    sample = read(ASKED, CALLS | {key: "I must look."}, *RESULTS, ANSWERED | {key: "It is é."})
    assert [message.thought for message in sample.messages] == ["", "I must look.", "", "", "It is é."]


@pytest.mark.parametrize(("key", "yes", "no"), [("train", True, False), ("weight", 1, 0), ("weight", 1.0, 0.0)])
def test_messages_say_whether_they_are_learnt(key: str, yes: Any, no: Any) -> None:
    sample = read(ASKED | {key: no}, CALLS | {key: yes}, *RESULTS, ANSWERED | {key: no}, ASKED, ANSWERED)
    assert [message.train for message in sample.messages] == [False, True, None, None, False, None, None]


def test_content_in_parts_with_media() -> None:
    picture = {"bytes": b"x", "path": None}
    parts = [
        {"type": "text", "text": "See ", "image_url": None},
        {"type": "image_url", "image_url": {"url": "https://x/1.png", "detail": "low"}, "text": None},
        {"type": "image_url", "image_url": "2.png"},
        {"type": "image", "image": picture},
        " and ",
        {"type": "video", "path": "v.mp4"},
        {"type": "audio", "url": "a.mp3"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
    ]
    sample = read({"role": "user", "content": parts}, *talk(("assistant", [{"type": "text", "text": "b"}])))
    assert [message.content for message in sample.messages] == ["See <image><image><image> and <video><audio><audio>", "b"]
    assert sample.images == ("https://x/1.png", "2.png", picture)
    assert (sample.videos, sample.audios) == (("v.mp4",), ("a.mp3", "data:audio/mp3;base64,AAAA"))


def test_parts_may_leave_the_media_to_their_column() -> None:
    form = make({"messages": "messages", "images": "images"})
    parts = [{"type": "image"}, {"type": "text", "text": "Who?"}]
    sample = form.read({"messages": talk(("user", parts), ("assistant", "b")), "images": ["1.png"]})
    assert (sample.messages[0].content, sample.images) == ("<image>Who?", ("1.png",))
    with pytest.raises(BadRecord, match="images stand both in 'images' and inside of messages"):
        form.read({"messages": talk(("user", [{"type": "image", "image": "2.png"}]), ("assistant", "b")), "images": ["1.png"]})


def test_results_at_the_end_are_taken_off_and_counted() -> None:
    sample = read(ASKED, CALLS, *RESULTS)
    assert [message.role for message in sample.messages] == ["user", "function"]
    assert (sample.trailing, sample.unanswered) == (2, "")


def test_a_question_at_the_end_is_kept() -> None:
    sample = read(ASKED, ANSWERED, ASKED)
    assert (len(sample.messages), sample.trailing, sample.unanswered) == (3, 0, "the conversation ends with a question")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([ASKED, ASKED, ANSWERED], "'messages'[1] is of role 'user' where an answer or a tool call is due"),
        ([ASKED, ANSWERED, ANSWERED], "'messages'[2] is of role 'assistant' where a question or a tool's result is due"),
        ([ASKED, CALLS, ANSWERED], "'messages'[2] is of role 'assistant'"),
        ([ASKED, CALLS, RESULTS[0], ASKED, ANSWERED], "'messages'[3] is of role 'user' where an answer"),
        ([*talk(("system", "s"), ("developer", "d")), ASKED, ANSWERED], "'messages'[1] is a system message, which should stand first"),
        ([ANSWERED], "'messages'[0] is of role 'assistant'"),
        (RESULTS, "'messages' holds no question and no answer"),
        ([], "'messages' holds no question and no answer"),
        ({"role": "user"}, "'messages' should be a list of messages, found dict"),
        ([ASKED, {"role": "assistant", "content": None}], "'messages'[1].content should be text, found nothing"),
        ([ASKED, ANSWERED, ASKED, {"role": "assistant", "content": 5}], "'messages'[3].content should be text, found int"),
        ([{"from": "human", "value": "a"}], "'messages'[0] should be a message with 'role' and 'content', found 'from', 'value'"),
        (talk(("narrator", "a")), "'messages'[0].role should be one of 'user', 'assistant', 'tool', "),
        (talk(("user", [{"type": "text", "text": 5}])), "'messages'[0].content[0].text should be text, found int"),
        (talk(("user", ["a", {"type": "file"}])), "'messages'[0].content[1] should be a part with a 'type' of text, image, "),
        (talk(("user", [5])), "'messages'[0].content[0] should be a part"),
        ([ASKED | {"tool_calls": [call("f", {})]}], "'messages'[0] is of role 'user', but only an assistant calls tools and thinks"),
        ([ASKED | {"thinking": "Hm."}], "only an assistant calls tools and thinks"),
        ([ASKED, CALLS | {"tool_calls": "look"}], "'messages'[1].tool_calls should be a list, found str"),
        ([ASKED, CALLS | {"tool_calls": ["look"]}], "'messages'[1].tool_calls[0] should be a call"),
        ([ASKED, CALLS | {"tool_calls": [call("f", "{")]}], "'messages'[1].tool_calls[0].function.arguments is not JSON"),
        (
            [ASKED, CALLS | {"tool_calls": [call("f", {}), call("f", 5)]}],
            "'messages'[1].tool_calls[1].function.arguments should be an object",
        ),
        ([ASKED, CALLS | {"tool_calls": [call("", {})]}], "'messages'[1].tool_calls[0].function should be a call"),
        ([ASKED, CALLS | {"tool_calls": [call("f", {"x": b""})]}], "'messages'[1].tool_calls[0].function cannot be written as JSON"),
        ([ASKED, CALLS | {"tool_calls": [call("f", '{"x": "\\ud800"}')]}], "arguments has a broken character"),
        ([ASKED, {"role": "assistant", "function_call": {"name": "f"}}], "'messages'[1].function_call should be a call"),
        ([ASKED | {"train": True}, ANSWERED], "'messages'[0] is to be learnt, but only answers are; 'train_on_prompt' learns"),
        ([ASKED, ANSWERED | {"train": 1}], "'messages'[1].train should be true or false, found int"),
        ([ASKED, ANSWERED | {"weight": 0.5}], "'messages'[1].weight should be 0 or 1, found '0.5'"),
        ([ASKED, ANSWERED | {"reasoning": ["x"]}], "the reasoning of 'messages'[1] should be text, found list"),
        (talk(("user", json.loads('"\\udfff"'))), "'messages'[0].content has a broken character (a lone surrogate)"),
        (talk(("user", [{"type": "text", "text": json.loads('"\\udfff"')}])), "'messages'[0].content[0].text has a broken character"),
    ],
)
def test_bad_records_say_where_and_why(messages: Any, reason: str) -> None:
    with pytest.raises(BadRecord, match=re.escape(reason)):
        make().read({"messages": messages})


def test_the_tags_of_a_file_for_the_reference_count() -> None:
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "observation_tag": "result"}
    messages = [{"from": "human", "value": "a"}, {"from": "gpt", "tool_calls": [call("f", {})]}, {"from": "result", "value": "r"}]
    record = {"conversations": [*messages, {"from": "gpt", "value": "b"}]}
    for columns in (None, {"messages": "conversations"}):  # the reference's column where the entry names none
        assert [message.role for message in make(columns, tags).read(record).messages] == ["user", "function", "observation", "assistant"]
    with pytest.raises(BadRecord, match="'messages' should be a list of messages, found nothing"):
        make({"messages": "messages"}, tags).read(record)


def test_a_message_may_be_a_function_turn_by_its_tag() -> None:
    sample = make(tags={"function_tag": "function"}).read({"messages": [ASKED, *talk(("function", '{"name": "f", "arguments": {}}'))]})
    assert sample.messages[1] == Message("function", '{"name": "f", "arguments": {}}')


def test_messages_may_be_json_text_in_a_table_of_texts() -> None:
    assert make().read({"messages": json.dumps([ASKED, ANSWERED])}) == read(ASKED, ANSWERED)
    with pytest.raises(BadRecord, match="'messages' is not JSON"):
        make().read({"messages": "[{"})


@pytest.mark.parametrize("completion", ["b", ANSWERED, [ANSWERED]])
def test_a_response_column_ends_the_conversation(completion: Any) -> None:
    form = make({"messages": "prompt", "response": "completion", "kto_tag": "label"})
    sample = form.read({"prompt": [ASKED], "completion": completion, "label": False})
    assert (sample.messages, sample.desirable) == ((Message("user", "a"), Message("assistant", "b")), False)
    assert form.read({"prompt": [ASKED], "label": True}).unanswered


GOOD, BAD = ({"role": "assistant", "content": word} for word in ("yes", "no"))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
        {"messages": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [ASKED], "chosen": "yes", "rejected": "no"},
        {"messages": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ],
)
def test_pairs_in_every_shape(record: dict[str, Any]) -> None:
    sample = make(ranking=True).read(record)
    assert sample == Sample((Message("user", "a"),), chosen=Message("assistant", "yes"), rejected=Message("assistant", "no"))


def test_pairs_after_tools_and_with_calls_and_media() -> None:
    picture = {"role": "user", "content": [{"type": "image", "image": "1.png"}]}
    sample = make(ranking=True).read({"messages": [picture, CALLS, *RESULTS], "chosen": CALLS, "rejected": BAD})
    assert (len(sample.messages), sample.trailing, sample.images) == (4, 0, ("1.png",))
    assert sample.chosen == sample.messages[1]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [ASKED, ANSWERED], "chosen": GOOD, "rejected": BAD}, "'messages'[1] is an answer, where 'chosen'"),
        ({"chosen": GOOD, "rejected": BAD}, "'messages' holds no question and no answer"),
        ({"messages": [ASKED], "chosen": [ASKED, GOOD], "rejected": [BAD]}, "should be the same conversation but for its last message"),
        ({"messages": [ASKED, ANSWERED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "does not begin with 'messages'"),
        ({"messages": [ASKED], "chosen": [ASKED, ASKED], "rejected": [ASKED, BAD]}, "'chosen'[1] is of role 'user' where an answer"),
        ({"messages": [ASKED], "chosen": GOOD, "rejected": 5}, "'rejected' should be an answer, as text or as a message, found int"),
        (
            {"messages": [ASKED], "chosen": {"role": "assistant", "content": 5}, "rejected": BAD},
            "'chosen'.content should be text, found int",
        ),
    ],
)
def test_broken_pairs(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecord, match=re.escape(reason)):
        make(ranking=True).read(record)


def test_real_messages_are_read_alike_in_both_formats(shared: Path) -> None:
    records = json.loads((shared / "data" / "kto_en_demo.json").read_text(encoding="utf-8"))
    columns, words = {"messages": "messages", "kto_tag": "label"}, {"role_tag": "role", "content_tag": "content"}
    sharegpt = FORMATS["sharegpt"](Columns(**columns), Tags(**words, user_tag="user", assistant_tag="assistant"))
    assert len(records) == 300
    assert all(make(columns).read(record) == sharegpt.read(record) for record in records)


def test_real_tool_calls_are_read_alike_in_both_formats(shared: Path) -> None:
    """The same conversations as an API would give them."""
    records = json.loads((shared / "data" / "glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    words = {"human": "user", "gpt": "assistant", "observation": "tool"}
    sharegpt = FORMATS["sharegpt"](Columns(tools="tools"), Tags())
    seen = 0
    for record in records:
        messages = []
        for turn in record["conversations"]:
            if turn["from"] == "function_call":
                made = json.loads(turn["value"])
                messages.append({"role": "assistant", "content": None, "tool_calls": [call(made["name"], json.dumps(made["arguments"]))]})
            else:
                messages.append({"role": words[turn["from"]], "content": turn["value"]})
        ours, theirs = make().read({"messages": messages, "tools": json.loads(record["tools"])}), sharegpt.read(record)
        assert [message.role for message in ours.messages] == [message.role for message in theirs.messages]
        assert json.loads(ours.tools or "[]") == json.loads(theirs.tools or "[]") == json.loads(record["tools"])
        for one, other in zip(ours.messages, theirs.messages, strict=True):
            assert one.content == other.content if one.role != "function" else json.loads(one.content) == [json.loads(other.content)]
            seen += one.role == "function"
    assert seen > 100
