"""Records of alpaca and sharegpt become samples, and what cannot become one says why."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finery.data.formats import FORMATS
from finery.data.formats.base import Columns, Format, Tags
from finery.data.registry import PACKAGED
from finery.data.sample import BadRecord, Message, Sample

BROKEN = json.loads('"\\ud800"')


def make(name: str, columns: dict[str, Any] | None = None, tags: dict[str, Any] | None = None, ranking: bool = False) -> Format:
    """A format as a registry entry would make it."""
    return FORMATS[name](Columns(**columns or {}), Tags(**tags or {}), ranking)


def pairs(sample: Sample) -> list[tuple[str, str]]:
    """Roles and texts of a sample."""
    return [(message.role, message.content) for message in sample.messages]


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
    assert pairs(make("alpaca").read(record | {"output": "3"})) == [("user", question), ("assistant", "3")]


def test_alpaca_history_system_tools_and_media() -> None:
    form = make("alpaca", {"history": "past", "system": "sys", "tools": "t", "images": "pictures", "audios": "sound"})
    record = {"instruction": "c", "output": "d", "past": [["a", "b"], ("a2", "b2")], "sys": "Be terse.", "t": [{"name": "f"}]}
    sample = form.read(record | {"pictures": ["1.png", "2.png"], "sound": "a.wav"})
    assert [message.content for message in sample.messages] == ["a", "b", "a2", "b2", "c", "d"]
    assert [message.role for message in sample.messages] == ["user", "assistant"] * 3
    assert sample.system == "Be terse."
    assert json.loads(sample.tools) == [{"name": "f"}]
    assert (sample.images, sample.videos, sample.audios) == (("1.png", "2.png"), (), ("a.wav",))


@pytest.mark.parametrize(
    "extra", [{}, {"past": None, "sys": None, "pictures": None}, {"past": [], "pictures": []}, {"past": "", "pictures": ""}]
)
def test_what_is_optional_may_be_absent_null_or_empty(extra: dict[str, Any]) -> None:
    sample = make("alpaca", {"history": "past", "system": "sys", "images": "pictures"}).read({"instruction": "a", "output": "b"} | extra)
    assert sample == Sample((Message("user", "a"), Message("assistant", "b")))


def test_alpaca_keeps_an_empty_answer() -> None:
    assert pairs(make("alpaca").read({"instruction": "a", "output": ""}))[-1] == ("assistant", "")


@pytest.mark.parametrize(
    ("columns", "record", "why"),
    [
        ({}, {"instruction": "a", "output": None}, "'output' is null"),
        ({}, {"instruction": "a"}, "'output' is not in the record"),
        ({"prompt": "text"}, {"text": "a"}, "'output' is not in the record"),
        ({"response": None}, {"instruction": "a", "output": "b"}, "no column holds answers"),
    ],
)
def test_alpaca_without_an_answer(columns: dict[str, Any], record: dict[str, Any], why: str) -> None:
    """Pretraining text and prompts have none; whether it is needed is the kind of row's business."""
    assert make("alpaca", columns).read(record) == Sample((Message("user", "a"),), unanswered=why)


def test_alpaca_pairs() -> None:
    form = make("alpaca", {"prompt": "q", "chosen": "good"}, ranking=True)
    sample = form.read({"q": "a", "good": "yes", "rejected": "no"})
    assert (pairs(sample), sample.unanswered) == ([("user", "a")], "")
    assert (sample.chosen, sample.rejected) == (Message("assistant", "yes"), Message("assistant", "no"))
    with pytest.raises(BadRecord, match="'rejected' should be text, found nothing"):
        form.read({"q": "a", "good": "yes"})


@pytest.mark.parametrize("tag", [True, False])
def test_kto(tag: bool) -> None:
    assert make("alpaca", {"kto_tag": "label"}).read({"instruction": "a", "output": "b", "label": tag}).desirable is tag
    talked = {"conversations": talk(*ROUND), "label": tag}
    assert make("sharegpt", {"kto_tag": "label"}).read(talked).desirable is tag
    for wrong, found in ((None, "nothing"), ("true", "str"), (1, "int")):
        with pytest.raises(BadRecord, match=f"'label' should be true or false, found {found}"):
            make("sharegpt", {"kto_tag": "label"}).read(talked | {"label": wrong})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "", "input": "", "output": "b"}, "question is empty: nothing stands in 'instruction' and 'input'"),
        ({"instruction": None, "output": "b"}, "nothing stands in 'instruction'"),
        ({"prompt": "a", "output": "b"}, "no question: the record has neither of 'instruction', 'input', but 'prompt', 'output'"),
        ({}, "but nothing at all"),
        ({"instruction": "a", "output": 4}, "'output' should be text, found int"),
        ({"instruction": ["a"], "output": "b"}, "'instruction' should be text, found list"),
        ({"instruction": "a", "input": 4, "output": "b"}, "'input' should be text, found int"),
        ({"instruction": "a", "output": "b", "past": 5}, "'past' should be a list of pairs of question and answer, found int"),
        ({"instruction": "a", "output": "b", "past": [["a", "b"], ["one"]]}, "'past'[1] should be a pair"),
        ({"instruction": "a", "output": "b", "past": [["one", None]]}, "'past'[0][1] should be text, found nothing"),
        ({"instruction": "a", "output": "b", "t": "{"}, "'t' is not JSON"),
        ({"instruction": "a", "output": "b", "t": "[" * 200_000}, "'t' is not JSON"),
        ({"instruction": "a", "output": "b", "t": "5"}, "'t' should be a list of function schemas, found int"),
        ({"instruction": "a", "output": "b", "t": '[{"name": "f"}, 5]'}, "'t'[1] should be a function schema"),
        ({"instruction": "a", "output": "b", "t": [{"type": "function", "function": {}}]}, "'t'[0] should be a function schema"),
        ({"instruction": "a", "output": "b", "t": [{"name": b"f"}]}, "'t' cannot be written as JSON"),
        ({"instruction": "a", "output": "b", "sys": 5}, "'sys' should be text, found int"),
        ({"instruction": "a", "output": "b", "pictures": ["a.png", None]}, "'pictures'[1] is null"),
        ({"instruction": "a", "output": "b" + BROKEN}, "'output' has a broken character (a lone surrogate)"),
        ({"instruction": BROKEN, "output": "b"}, "'instruction' has a broken character"),
        ({"instruction": "a", "output": "b", "past": [[BROKEN, "b"]]}, "'past'[0][0] has a broken character"),
        ({"instruction": "a", "output": "b", "t": '[{"name": "\\ud800"}]'}, "'t' has a broken character"),
    ],
)
def test_alpaca_says_why_a_record_is_bad(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecord, match=re.escape(reason)):
        make("alpaca", {"history": "past", "tools": "t", "system": "sys", "images": "pictures"}).read(record)


def test_characters_outside_the_first_plane_are_not_broken() -> None:
    tools = '[{"name": "f", "description": "\\ud83d\\ude00"}]'  # a pair of surrogates, as JSON writes it
    sample = make("alpaca", {"tools": "t"}).read({"instruction": "😀", "output": json.loads('"\\ud83d\\ude00"'), "t": tools})
    assert (pairs(sample), sample.tools) == ([("user", "😀"), ("assistant", "😀")], tools)


@pytest.mark.parametrize("value", ["", " ", "[]", None, []])
def test_no_tools_in_every_spelling(value: Any) -> None:
    assert make("alpaca", {"tools": "t"}).read({"instruction": "a", "output": "b", "t": value}).tools == ""


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


ROUND = (("human", "a"), ("gpt", "b"))
CALL = '{"name": "look", "arguments": {"at": "it"}}'


def test_sharegpt_leading_system_message_wins_over_the_column() -> None:
    form = make("sharegpt", {"system": "sys"})
    sample = form.read({"conversations": talk(("system", "inner"), *ROUND), "sys": "outer"})
    assert (len(sample.messages), sample.system) == (2, "inner")
    assert form.read({"conversations": talk(*ROUND), "sys": "outer"}).system == "outer"


def test_sharegpt_calls_and_observations() -> None:
    sample = make("sharegpt").read({"conversations": talk(("human", "a"), ("function_call", CALL), ("observation", "o"), ("gpt", "b"))})
    assert pairs(sample) == [("user", "a"), ("function", CALL), ("observation", "o"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("text", "content", "before"),
    [
        (CALL, CALL, ""),
        (f"[{CALL}, {CALL}]", f"[{CALL}, {CALL}]", ""),
        (f"<tool_call>\n{CALL}\n</tool_call>", CALL, ""),
        (f"I look.\n<tool_call>{CALL}</tool_call>", CALL, "I look.\n"),
        (f"I look.<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", f"[{CALL}, {CALL}]", "I look."),
        (f"<think>\nHm.\n</think>\n\n{CALL}", CALL, "<think>\nHm.\n</think>\n\n"),
        ('{"name": "f", "arguments": {"x": "<tool_call></tool_call>"}}',) * 2 + ("",),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', '[{"name": "f", "arguments": {"x": 1}}]', ""),
        ('{"name": "f", "arguments": ""}', '[{"name": "f", "arguments": {}}]', ""),
    ],
)
def test_sharegpt_what_a_call_may_look_like(text: str, content: str, before: str) -> None:
    call = make("sharegpt").read({"conversations": talk(("human", "a"), ("function_call", text))}).messages[1]
    assert (call.content, call.before_calls) == (content, before)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("look()", "'conversations'[1].value is not JSON"),
        ("<tool_call>look()</tool_call>", "'conversations'[1].value is not JSON"),
        ("{}", "'conversations'[1].value should be a call, an object with 'name' and 'arguments'"),
        ('{"name": "f"}', "'conversations'[1].value should be a call"),
        (f'[{CALL}, {{"name": 5, "arguments": {{}}}}]', "'conversations'[1].value[1] should be a call"),
        ('{"name": "f", "arguments": [1]}', "'conversations'[1].value.arguments should be an object, found list"),
        ('{"name": "f", "arguments": "x"}', "'conversations'[1].value.arguments is not JSON"),
        ('{"name": "\\udfff", "arguments": {}}', "'conversations'[1].value has a broken character"),
        ("[]", "'conversations'[1].value holds no call"),
        ('"look"', "'conversations'[1].value should be a call"),
    ],
)
def test_sharegpt_broken_calls(text: str, reason: str) -> None:
    with pytest.raises(BadRecord, match=re.escape(reason)):
        make("sharegpt").read({"conversations": talk(("human", "a"), ("function_call", text))})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (talk(("gpt", "b"), ("human", "a")), "'conversations'[0] is of role 'gpt' where a question or a tool's result is due"),
        (talk(*ROUND, ("gpt", "b"), ("human", "a")), "'conversations'[2] is of role 'gpt'"),
        (
            talk(("system", "s"), ("human", "a"), ("human", "a")),
            "'conversations'[2] is of role 'human' where an answer or a tool call is due",
        ),
        (talk(("human", "a"), ("observation", "o")), "'conversations'[1] is of role 'observation'"),
        (talk(("human", "a"), ("function_call", CALL), ("observation", "o"), ("observation", "o")), "'conversations'[3] is of role 'obs"),
        (talk(*ROUND, ("system", "late"), ("gpt", "b")), "'conversations'[2] is a system message, which should stand first"),
        (talk(("system", "s")), "'conversations' holds no question and no answer"),
        ([], "'conversations' holds no question and no answer"),
        (talk(("narrator", "a"), ("gpt", "b")), "'conversations'[0].from should be one of 'human', 'gpt', "),
        ([{"from": ["human"], "value": "a"}], "'conversations'[0].from should be text, found list"),
        ([{"role": "user", "content": "a"}], "'conversations'[0] should be a message with 'from' and 'value', found 'role', 'content'"),
        ([*talk(*ROUND), {"from": "human", "value": None}], "'conversations'[2].value should be text, found nothing"),
        ([{"from": "human"}], "'conversations'[0].value should be text, found nothing"),
        (talk(("human", BROKEN)), "'conversations'[0].value has a broken character"),
        (["hello"], "'conversations'[0] should be a message with 'from' and 'value', found str"),
        ([{"from": "human", "value": "a", "train": True}], "'conversations'[0] is to be learnt, but only answers are"),
        (
            [*talk(("human", "a")), {"from": "gpt", "value": "a", "train": "no"}],
            "'conversations'[1].train should be true or false, found str",
        ),
        ([*talk(("human", "a")), {"from": "gpt", "value": "", "tool_calls": [{}]}], "'formatting: openai' reads"),
        (None, "'conversations' should be a list of messages, found nothing"),
        ("hello", "'conversations' should be a list of messages, found str"),
    ],
)
def test_sharegpt_says_why_a_record_is_bad(messages: Any, reason: str) -> None:
    with pytest.raises(BadRecord, match=re.escape(reason)):
        make("sharegpt").read({"conversations": messages})


def test_sharegpt_that_ends_with_a_question() -> None:
    sample = make("sharegpt").read({"conversations": talk(*ROUND, ("human", "c"))})
    assert (len(sample.messages), sample.unanswered) == (3, "the conversation ends with a question")


def test_sharegpt_messages_say_whether_they_are_learnt() -> None:
    turns = [turn | {"train": train} for turn, train in zip(talk(*ROUND, *ROUND), (False, True, None, False), strict=True)]
    assert [message.train for message in make("sharegpt").read({"conversations": turns}).messages] == [False, True, None, False]


def test_sharegpt_pairs() -> None:
    form = make("sharegpt", {"chosen": "good", "rejected": "bad"}, ranking=True)
    good, bad = talk(("gpt", "yes"), ("function_call", CALL))
    sample = form.read({"conversations": talk(*ROUND, ("human", "c")), "good": good, "bad": bad})
    assert (sample.chosen, sample.rejected) == (Message("assistant", "yes"), Message("function", CALL))
    assert (len(sample.messages), sample.unanswered) == (3, "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conversations": talk(*ROUND)}, "'conversations'[1] is an answer, where 'chosen' and 'rejected' should answer a question"),
        ({"conversations": None}, "'conversations' holds no question and no answer"),
        ({"chosen": None}, "'chosen' should be an answer, as text or as a message, found nothing"),
        ({"chosen": []}, "'chosen' should be an answer, as text or as a message, found list"),
        ({"chosen": {"from": "human", "value": "x"}}, "'chosen' is of role 'human' where an answer or a tool call is due"),
        ({"rejected": {"from": "gpt", "value": 5}}, "'rejected'.value should be text, found int"),
        ({"rejected": {"role": "assistant"}}, "'rejected' should be a message with 'from' and 'value', found 'role'"),
    ],
)
def test_sharegpt_broken_pairs(changes: dict[str, Any], reason: str) -> None:
    record = {"conversations": talk(("human", "a")), "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"}}
    assert make("sharegpt", ranking=True).read(record).chosen
    with pytest.raises(BadRecord, match=re.escape(reason)):
        make("sharegpt", ranking=True).read(record | changes)


def test_partial_columns_keep_defaults() -> None:
    """Where the reference takes every column that is left out for absent."""
    form = make("alpaca", {"prompt": "q", "system": "sys"})
    assert pairs(form.read({"q": "a", "input": "more", "output": "b"})) == [("user", "a\nmore"), ("assistant", "b")]
    form = make("sharegpt", {"tools": "t"})
    assert len(form.read({"conversations": talk(*ROUND), "t": ""}).messages) == 2


def test_partial_tags_keep_defaults() -> None:
    """Where the reference drops a sample with a system message, or crashes."""
    form = make("sharegpt", {}, {"user_tag": "user", "assistant_tag": "assistant"})
    sample = form.read({"conversations": talk(("system", "s"), ("user", "a"), ("assistant", "b"))})
    assert (sample.system, pairs(sample)) == ("s", [("user", "a"), ("assistant", "b")])


def test_a_format_tells_which_columns_it_was_asked_to_read() -> None:
    form = make("alpaca", {"response": "respnse", "query": None, "messages": "m", "chosen": "c"})
    assert form.asked == {"response": "respnse"}
    assert form.unread == {"messages": "m", "chosen": "c"}
    assert make("alpaca", {"response": "r", "chosen": "c"}, ranking=True).asked == {"response": "r", "chosen": "c"}
    assert (make("sharegpt").asked, make("sharegpt").unread) == ({}, {})


def read_all(folder: Path, name: str) -> Iterator[Sample]:
    """The samples of a set of a folder with a registry; every record must be read."""
    entry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name]
    text = (folder / entry["file_name"]).read_text(encoding="utf-8")
    if entry["file_name"].endswith(".json"):
        records = json.loads(text)
    else:
        records = [json.loads(line) if line.startswith("{") else {"text": line} for line in text.split("\n") if line]
    form = make(entry.get("formatting", "alpaca"), entry.get("columns"), entry.get("tags"), entry.get("ranking", False))
    assert not form.unread
    assert all(any(column in record for record in records) for column in form.asked.values())
    return map(form.read, records)


@pytest.mark.parametrize(
    ("name", "count", "media"),
    [
        ("identity", 91, set()),
        ("alpaca_en_demo", 999, set()),
        ("alpaca_zh_demo", 1000, set()),
        ("glaive_toolcall_en_demo", 300, set()),
        ("kto_en_demo", 300, set()),
        ("mllm_demo", 6, {"images"}),
        ("mllm_audio_demo", 3, {"audios"}),
        ("mllm_video_demo", 3, {"videos"}),
        ("mllm_video_audio_demo", 3, {"videos", "audios"}),
    ],
)
def test_real_answers_are_read_without_loss(shared: Path, name: str, count: int, media: set[str]) -> None:
    samples = list(read_all(shared / "data", name))
    assert len(samples) == count
    assert not any(sample.unanswered for sample in samples)
    assert {role for sample in samples for role in ("images", "videos", "audios") if getattr(sample, role)} == media
    assert {sample.desirable for sample in samples} == ({True, False} if "kto" in name else {None})
    assert any(sample.tools for sample in samples) == ("toolcall" in name)


def test_real_pairs_and_texts_are_read_without_loss(shared: Path) -> None:
    samples = list(read_all(shared / "data", "dpo_en_demo"))
    assert len(samples) == 300
    assert all(sample.chosen and sample.rejected and sample.messages[-1].role == "user" for sample in samples)
    for name, count in (("c4_demo", 300), ("wiki_demo", 30)):
        samples = list(read_all(shared / "data", name))
        assert len(samples) == count
        assert all(sample.unanswered and len(sample.messages) == 1 for sample in samples)


@pytest.mark.parametrize("name", sorted(json.loads((PACKAGED / "dataset_info.json").read_text(encoding="utf-8"))))
def test_packaged_sets_are_read_without_loss(name: str) -> None:
    assert list(read_all(PACKAGED, name))
