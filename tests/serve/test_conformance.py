"""What OpenAI's own client gets: every feature, whole and streamed, by the sync and by the async client."""

import json
from typing import Any

import openai
import pytest

from serving import CLOCK, FORMAT, WEATHER, Running, joined, read

streams = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


@streams
@pytest.mark.parametrize(
    ("text", "content", "thought", "cities"),
    [
        ("hello", "Hi there, 你好! 🙂", "", None),
        ("think", "Four.", "Two and two.", None),
        ("endless thought", "", "Two and two", None),
        ("weather", "", "", ["Rome"]),
        ("say first", "Let me see.", "I have to look.", ["Rome"]),
        ("two cities", "", "", ["Rome", "Oslo"]),
        ("almost", 'I like <tool_ and <b> tags, {"a": 1} and spaces  .  ', "", []),
        ("broken", "Hm.\n<tool_call>\nno JSON\n</tool_call> so be it", "", []),
        ("hello", "Hi there, 你好! 🙂", "", []),
    ],
)
def test_answers_are_read(client: Any, streamed: bool, text: str, content: str, thought: str, cities: list[str] | None) -> None:
    found = read(client, streamed, text, **({"tools": [WEATHER]} if cities is not None else {}))
    finish = "tool_calls" if cities else "stop"
    assert (found["role"], found["content"], found["thought"] or "", found["finish"]) == ("assistant", content, thought, finish)
    calls = found["calls"].values()
    assert [json.loads(call["arguments"])["city"] for call in calls] == (cities or [])
    assert all(call["name"] == "weather" and call["id"].startswith("call_") for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)


def test_text_before_a_call_comes_at_once_and_no_part_of_the_call(client: Any) -> None:
    events = client.chat("say first", tools=[WEATHER], stream=True)
    texts = [event.choices[0].delta.content for event in events if event.choices[0].delta.content]
    assert len(texts) > 4 and "".join(texts) == "Let me see."


@streams
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "clock"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"}), ("auto", set())],
    ids=["required", "named", "auto"],
)
def test_tool_choice(client: Any, streamed: bool, choice: Any, names: set[str]) -> None:
    found = read(client, streamed, "unruly", tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=400, temperature=0)
    if not names:
        assert found["content"].startswith("I would rather")
    elif found["finish"] == "tool_calls":
        assert {call["name"] for call in found["calls"].values()} <= names
    else:  # an engine that writes what comes first goes on for ever inside of a string: it is cut, and still in its form
        assert found["finish"] == "length" and found["content"].startswith('<tool_call>\n{"name": "')
    found = read(client, streamed, "weather", tools=[WEATHER, CLOCK], tool_choice=choice)
    assert [json.loads(call["arguments"]) for call in found["calls"].values()] == [{"city": "Rome"}]


def test_tool_choice_none_describes_no_tools(client: Any, scripted: Running) -> None:
    found = read(client, False, "weather", tools=[WEATHER], tool_choice="none")
    assert found["content"].startswith("<tool_call>") and not found["calls"]
    assert "The weather of a city." not in scripted.engine.prompts[-1]


def test_one_call_at_a_time(client: Any) -> None:
    found = read(client, False, "two cities", tools=[WEATHER], parallel_tool_calls=False)
    assert len(found["calls"]) == 1


def test_several_calls_may_be_required(client: Any) -> None:
    found = read(client, True, "two cities", tools=[WEATHER], tool_choice="required")
    assert [json.loads(call["arguments"])["city"] for call in found["calls"].values()] == ["Rome", "Oslo"]


def test_a_strict_tool_holds_calls_alone_to_its_schema(client: Any, scripted: Running) -> None:
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    assert read(client, False, "hello", tools=[strict])["content"].startswith("Hi there")
    assert read(client, False, "say first", tools=[strict])["calls"][0]["arguments"] == '{"city": "Rome"}'
    scripted.engine.script["wrong call"] = 'So.\n<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</tool_call>'
    assert "town" not in json.dumps(read(client, False, "wrong call", tools=[strict]))


@streams
@pytest.mark.parametrize("text", ["json", "unruly"])
@pytest.mark.parametrize("form", [FORMAT, {"type": "json_object"}], ids=["json_schema", "json_object"])
def test_response_format(client: Any, streamed: bool, text: str, form: Any) -> None:
    found = read(client, streamed, text, response_format=form)
    if text == "json":
        assert json.loads(found["content"]) == {"ok": True, "color": "red"} and found["finish"] == "stop"
    elif form is FORMAT:
        assert json.loads(found["content"]).keys() == {"ok", "color"}
    else:
        assert found["content"].startswith("{") and found["finish"] in ("stop", "length")


def test_a_thought_may_come_before_a_form(client: Any, scripted: Running) -> None:
    scripted.engine.script["thoughtful"] = '<think>\nRed?\n</think>\n\n{"ok": false, "color": "green"}'
    found = read(client, False, "thoughtful", response_format=FORMAT)
    assert (found["thought"], json.loads(found["content"])) == ("Red?", {"ok": False, "color": "green"})


def test_pydantic_models_as_forms(client: Any) -> None:
    from pydantic import BaseModel

    class Answer(BaseModel):
        ok: bool
        color: str

    messages = [{"role": "user", "content": "json"}]
    found = client("chat.completions.parse", model="scripted", messages=messages, response_format=Answer)
    assert found.choices[0].message.parsed == Answer(ok=True, color="red")


@streams
def test_an_agent_loop(client: Any, streamed: bool) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say first"}]
    first = read(client, streamed, messages, tools=[WEATHER])
    calls = [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in first["calls"].values()
    ]
    messages.append({"role": "assistant", "content": first["content"], "tool_calls": calls, "reasoning_content": first["thought"]})
    messages.append(
        {
            "role": "tool",
            "tool_call_id": calls[0]["id"],
            "content": f"18 degrees in {json.loads(calls[0]['function']['arguments'])['city']}",
        }
    )
    last = read(client, streamed, messages, tools=[WEATHER])
    assert (last["content"], last["finish"]) == ("It is 18 degrees in Rome.", "stop")


def test_a_message_object_goes_back_as_it_came(client: Any, scripted: Running) -> None:
    message = client.chat("two cities", tools=[WEATHER]).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": f"result {at}"} for at, call in enumerate(message.tool_calls)]
    client.chat([{"role": "user", "content": "two cities"}, message, *reversed(results)], tools=[WEATHER])
    prompt = scripted.engine.prompts[-1]
    assert prompt.index('"city": "Rome"') < prompt.index('"city": "Oslo"') < prompt.index("result 0") < prompt.index("result 1")
    assert '\\"' not in prompt, "arguments are not text in text"


def test_parts_and_developers(client: Any, scripted: Running) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]
    assert read(client, False, messages)["content"].startswith("Hi")
    assert "system\nBe kind.\n\nBe brief.<" in scripted.engine.prompts[-1]


@streams
def test_logprobs(client: Any, streamed: bool) -> None:
    found = read(client, streamed, "hello", logprobs=True, top_logprobs=2)
    raw = b"".join(bytes(entry.bytes) for entry in found["logprobs"])
    assert raw.decode() == "Hi there, 你好! 🙂"
    assert all(entry.logprob == -0.5 and [top.logprob for top in entry.top_logprobs] == [-0.5, -2.0] for entry in found["logprobs"])


@streams
def test_stop_texts(client: Any, streamed: bool) -> None:
    found = read(client, streamed, "count", stop=[" 7", "nothing"], logprobs=True)
    assert (found["content"], found["finish"]) == ("0 1 2 3 4 5 6", "stop")
    assert "".join(entry.token for entry in found["logprobs"]) == "0 1 2 3 4 5 6"
    assert read(client, streamed, "count", stop=" 3")["content"] == "0 1 2"


@streams
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_lengths(client: Any, streamed: bool, field: str) -> None:
    found = read(client, streamed, "count", **{field: 3})
    assert found["finish"] == "length" and 0 < len(found["content"]) <= 6


def test_usage(client: Any, scripted: Running) -> None:
    used = client.chat("count", max_tokens=5, n=2).usage
    num_prompt = len(scripted.engine.asks[-1].prompt_ids)
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (num_prompt, 10, num_prompt + 10)
    events = client.chat("count", max_tokens=5, n=2, stream=True, stream_options={"include_usage": True})
    assert not events[-1].choices and events[-1].usage == used
    assert all(event.usage is None for event in events[:-1])
    assert all(event.usage is None and event.choices for event in client.chat("count", max_tokens=5, stream=True))


def test_several_answers(client: Any, scripted: Running) -> None:
    found = client.chat("hello", n=3, seed=7)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert sorted(ask.seed for ask in scripted.engine.asks[-3:]) == [7, 8, 9]
    events = client.chat("hello", n=3, stream=True)
    assert [joined(events, index)["content"] for index in range(3)] == ["Hi there, 你好! 🙂"] * 3


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ({"temperature": 0.5, "top_p": 0.25}, {"temperature": 0.5, "top_p": 0.25, "do_sample": True}),
        ({"temperature": 0}, {"temperature": 0.0, "do_sample": False}),
        ({"top_p": 0}, {"do_sample": False}),
        ({"presence_penalty": 1.5, "frequency_penalty": -0.5}, {"presence_penalty": 1.5, "frequency_penalty": -0.5}),
        (
            {"extra_body": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "do_sample": True}},
            {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2},
        ),
        ({}, {"temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 1024, "do_sample": True}),
        ({"user": "me", "metadata": {"a": "b"}, "store": False, "safety_identifier": "x", "temperature": None}, {"temperature": 0.95}),
    ],
)
def test_what_the_engine_is_asked(client: Any, scripted: Running, words: dict[str, Any], options: dict[str, Any]) -> None:
    client.chat("hello", **words)
    given = scripted.engine.asks[-1].options
    assert {name: getattr(given, name) for name in options} == options


def test_models(client: Any, scripted: Running) -> None:
    assert [model.id for model in client("models.list").data] == ["scripted", "poet"]
    assert client("models.retrieve", model="poet").object == "model"
    assert client.chat("hello", model="poet").model == "poet"
    assert scripted.engine.asks[-1].adapter == "poet"
    with pytest.raises(openai.NotFoundError) as caught:
        client("models.retrieve", model="gpt-9")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ({"prompt": "count"}, ["0 1 2"]),
        ({"prompt": "count", "echo": True}, ["count0 1 2"]),
        ({"prompt": ["count", "hello"]}, ["0 1 2", "Hi there"]),
        ({"prompt": ["count", "hello"], "n": 2}, ["0 1 2", "0 1 2", "Hi there", "Hi there"]),
        ({"prompt": "count", "stop": " 1"}, ["0"]),
    ],
)
@streams
def test_completions(client: Any, streamed: bool, words: dict[str, Any], texts: list[str]) -> None:
    found = client("completions.create", model="scripted", max_tokens=60, stream=streamed, **words)
    if streamed:
        got = ["".join(c.text for event in found for c in event.choices if c.index == at) for at in range(len(texts))]
        assert {c.finish_reason for event in found for c in event.choices} <= {None, "stop", "length"}
    else:
        got = [choice.text for choice in found.choices]
        assert found.object == "text_completion" and found.usage.completion_tokens > 0
    assert all(text.startswith(start) for text, start in zip(got, texts, strict=True))


def test_completions_of_token_ids_and_logprobs(client: Any, scripted: Running) -> None:
    ids = scripted.engine.tokenizer("hello")["input_ids"]
    found = client("completions.create", model="scripted", prompt=ids, logprobs=2, echo=False)
    told = found.choices[0].logprobs
    assert found.choices[0].text == "".join(told.tokens) if "\ufffd" not in "".join(told.tokens) else True
    assert told.token_logprobs[0] == -0.5 and told.text_offset[:2] == [0, len(told.tokens[0])] and len(told.top_logprobs[0]) == 2
    assert scripted.engine.asks[-1].prompt_ids == ids
    for prompt in ([10**6], [[]], [], [-1]):
        with pytest.raises(openai.BadRequestError):
            client("completions.create", model="scripted", prompt=prompt)
    for words in ({"suffix": "x"}, {"best_of": 2}, {"echo": True, "logprobs": 1}):
        with pytest.raises(openai.BadRequestError):
            client("completions.create", model="scripted", prompt="hello", **words)


def test_no_scores_yet(client: Any, scripted: Running) -> None:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as asking:
        for path, status in (("/score/evaluation", 405), ("/responses", 404)):
            with pytest.raises(openai.APIStatusError) as caught:
                asking.post(path, body={"model": "scripted", "messages": ["a"]}, cast_to=object)
            assert caught.value.status_code == status and isinstance(caught.value.body, dict)
