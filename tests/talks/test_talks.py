"""A talk: what is said, owed, taken back, drawn and counted; nothing is printed here."""

import json
from pathlib import Path
from typing import Any

import pytest

from finery.data.sample import Message
from finery.errors import UserError
from finery.talks.answering import Answering
from finery.talks.files import as_record, from_record, load, save
from finery.talks.options import TalkOptions
from finery.talks.speaker import Speaker
from finery.talks.talk import Talk
from serving import until

TOOLS = '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'


def answered(speaker: Speaker, talk: Talk, text: str, options: TalkOptions | None = None) -> Answering:
    talk.say(text)
    answering = speaker.begin(talk, options or speaker.options)
    for _ in answering:
        pass
    return answering


def test_what_was_said_is_told_to_the_model(speaker: Speaker) -> None:
    talk = Talk()
    talk.tell("Be brief.")
    answered(speaker, talk, "hello")
    answered(speaker, talk, "think")
    engine: Any = speaker.engine
    assert talk.messages[1::2] == [Message("assistant", "Hi there, 你好! 🙂"), Message("assistant", "Four.", "Two and two.\nReally.")]
    assert engine.prompts[-1].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>")
    assert "Hi there, 你好! 🙂<|im_end|>" in engine.prompts[-1]


def test_thoughts_and_tokens_are_counted(speaker: Speaker) -> None:
    answering = answered(speaker, Talk(), "think")
    count = speaker.template.tokenizer
    thought = len(count("<think>\nTwo and two.\nReally.")["input_ids"])
    assert answering.num_tokens == len(count("<think>\nTwo and two.\nReally.\n</think>\n\nFour.")["input_ids"])
    assert thought <= answering.num_thought_tokens <= answering.num_tokens - 1
    assert answering.finish == "stop" and answering.tokens_per_second is not None and answering.tokens_per_second > 0
    assert 0 <= (answering.first_seconds or 0) <= answering.seconds


def test_calls_are_owed_their_results(speaker: Speaker) -> None:
    talk = Talk()
    assert talk.offer(TOOLS) == ["weather"]
    answering = answered(speaker, talk, "weather")
    assert answering.content == "Hm." and [call.arguments["city"] for call in talk.owed] == ["Rome", "Oslo"]
    talk.say("3")
    assert [call.arguments["city"] for call in talk.owed] == ["Oslo"] and not talk.due
    answered(speaker, talk, "-8")
    assert [message.role for message in talk.messages] == ["user", "function", "observation", "observation", "assistant"]
    assert talk.messages[1].before_calls == "Hm." and talk.owed == []
    engine: Any = speaker.engine
    assert "<tool_response>\n-8\n</tool_response>" in engine.prompts[-1], "the prompt is written as in training"
    talk.take_back()
    assert talk.due and talk.messages[-1] == Message("observation", "-8")
    talk.take_back()
    assert talk.messages == [Message("user", "weather")], "results belong to the calls that are taken back"


def test_questions_are_taken_back() -> None:
    talk = Talk(messages=[Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")])
    assert talk.question == "c"
    talk.forget_question()
    assert talk.messages == [Message("user", "a"), Message("assistant", "b")]
    talk.clear()
    for change in (talk.take_back, talk.forget_question):
        with pytest.raises(UserError, match="yet"):
            change()


def test_a_stopped_answer_keeps_what_was_said(speaker: Speaker) -> None:
    engine: Any = speaker.engine
    engine.delay = 0.002
    talk = Talk()
    talk.say("count")
    answering = speaker.begin(talk, speaker.options)
    for _ in answering:
        if answering.content.startswith("0 1 2 3"):
            answering.stop()
    assert answering.finish == "stopped"
    assert talk.messages[-1] == Message("assistant", answering.content) and "499" not in answering.content
    assert until(lambda: engine.stopped), "the engine writes no further"


def test_an_answer_that_fails_is_no_hole_in_the_talk(speaker: Speaker) -> None:
    engine: Any = speaker.engine
    engine.fails = RuntimeError("the engine broke")
    talk = Talk()
    with pytest.raises(RuntimeError, match="the engine broke"):
        answered(speaker, talk, "hello")
    engine.fails = None
    assert answered(speaker, talk, "hello").content == "Hi there, 你好! 🙂"


def test_an_answer_that_only_thinks(speaker: Speaker) -> None:
    talk = Talk()
    answered(speaker, talk, "only thought")
    assert talk.messages[-1] == Message("assistant", "", "Two and two")


def test_a_model_is_told_not_to_think(speaker: Speaker) -> None:
    engine: Any = speaker.engine
    assert speaker.chooses_thinking
    answered(speaker, Talk(), "hello", speaker.options.changed(enable_thinking=False))
    assert engine.prompts[-1].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    answered(speaker, Talk(), "hello")
    assert engine.prompts[-1].endswith("<|im_start|>assistant\n")


def test_settings_reach_the_engine(speaker: Speaker) -> None:
    engine: Any = speaker.engine
    changed = speaker.options.changed_by(["temperature=0.2", "seed=7", "max_new_tokens=3"])
    answered(speaker, Talk(), "hello", changed)
    ask = engine.asks[-1]
    assert (ask.options.temperature, ask.options.max_new_tokens, ask.seed) == (0.2, 3, 7)
    assert speaker.options.temperature == 0.95, "of this talk alone"
    assert changed.changed_by(["seed="]).seed is None
    assert "seed=7" in changed.told() and "temperature=0.2" in changed.told()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("temprature=1", "there is no setting 'temprature'; did you mean 'temperature'?"),
        ("temperature", "a setting is changed by name=value, found 'temperature'"),
        ("top_p=2", "'top_p' should be at most 1, found 2"),
        ("do_sample=5.5", "'do_sample' should be true or false, found 5.5"),
        ("max_new_tokens=true", "'max_new_tokens' should be a whole number, found true"),
    ],
)
def test_settings_that_do_not_fit(word: str, told: str, speaker: Speaker) -> None:
    with pytest.raises(UserError) as error:
        speaker.options.changed_by([word])
    assert error.value.complaints == [told]


def test_special_tokens_are_left_out_unless_asked_for(speaker: Speaker) -> None:
    engine: Any = speaker.engine
    engine.script["marks"] = "a <|im_start|> b"
    assert answered(speaker, Talk(), "marks").content == "a  b"
    assert answered(speaker, Talk(), "marks", speaker.options.changed(skip_special_tokens=False)).content == "a <|im_start|> b"


WHOLE = Talk(
    "Be brief.",
    TOOLS,
    [
        Message("user", "hello\n你好"),
        Message("assistant", "Hi.", "Hm."),
        Message("user", "weather"),
        Message("function", '[{"name": "weather", "arguments": {"city": "Rome"}}]', "", "Let me see."),
        Message("observation", "18"),
        Message("assistant", "18."),
        Message("user", "And now?"),
    ],
)


def test_a_saved_talk_is_loaded_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    save(WHOLE, path)
    found = load(path)
    assert (found.system, found.messages) == (WHOLE.system, WHOLE.messages)
    assert json.loads(found.tools)[0]["function"] == json.loads(TOOLS)[0]
    call = json.loads(path.read_text(encoding="utf-8"))["messages"][4]["tool_calls"][0]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'} and call["type"] == "function"
    save(Talk(), path)
    assert load(path).messages == [], "a talk may be written over another"


def test_a_saved_talk_is_openai_s(tmp_path: Path) -> None:
    """Its own types take it."""
    from openai.types.chat import ChatCompletionMessageParam
    from pydantic import TypeAdapter

    TypeAdapter(list[ChatCompletionMessageParam]).validate_python(as_record(WHOLE)["messages"])


def test_results_are_put_in_the_order_of_their_calls() -> None:
    calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in "abc"]
    results = [{"role": "tool", "tool_call_id": id, "content": id} for id in "cab"]
    talk = from_record([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}, *results])
    assert [message.content for message in talk.messages[2:]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"{", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"{}", "should hold a list of 'messages', found nothing"),
        (b"3", "should hold a list of 'messages', found int"),
        (b'{"messages": [3]}', "'messages'[0] should be a message"),
        (b'[{"role": "assistant", "content": "x"}]', "'messages'[0] is of role 'assistant', which cannot stand there"),
        (b'[{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]', "'messages'[1] is of role 'user'"),
        (b'[{"role": "tool", "content": "x"}]', "'messages'[0] is of role 'tool'"),
        (b'[{"role": "user", "content": "\\ud800"}]', "broken character"),
        (b'[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]', "only texts can be talked about"),
        (b'{"messages": [], "tools": [{"nam": 1}]}', "function schema"),
    ],
)
def test_files_that_hold_no_talk(text: bytes, told: str, tmp_path: Path) -> None:
    """One message, and the file stays as it was when a talk is to be saved there."""
    path = tmp_path / "other.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        load(path)
    assert len(error.value.complaints) == 1 and told in str(error.value)
    with pytest.raises(UserError, match="holds no conversation"):
        save(Talk(), path)
    assert path.read_bytes() == text


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        save(Talk(), tmp_path / "nowhere" / "talk.json")


def test_texts_that_are_no_utf8_are_not_said() -> None:
    talk = Talk()
    for change in (talk.say, talk.tell):
        with pytest.raises(UserError, match="not UTF-8"):
            change("h\udce9")
    assert talk == Talk()
