"""What is refused is refused in OpenAI's shape, before anything is generated."""

import json
from typing import Any

import openai
import pytest

from serving import FORMAT, WEATHER, Running

streams = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])

REFUSED: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"model": "gpt-9"}, 404, "model", "model_not_found"),
    ({"extra_body": {"nonsense": 1}}, 400, "nonsense", "unknown_parameter"),
    ({"logit_bias": {"5": 10}}, 400, "logit_bias", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, 400, "reasoning_effort", "unsupported_parameter"),
    ({"functions": [{"name": "f"}]}, 400, "functions", "unsupported_parameter"),
    ({"temperature": 2.5}, 400, "temperature", "invalid_value"),
    ({"temperature": "1"}, 400, "temperature", "invalid_value"),
    ({"top_p": -1}, 400, "top_p", "invalid_value"),
    ({"n": 0}, 400, "n", "invalid_value"),
    ({"n": 129}, 400, "n", "invalid_value"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 5000}, 400, "max_tokens", "context_length_exceeded"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "invalid_value"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    ({"tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "no"}}}, 400, "tool_choice", None),
    ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools[0].function.name", "invalid_value"),
    ({"tools": [WEATHER], "response_format": FORMAT}, 400, "response_format", "unsupported_parameter"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "invalid_value"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}},
        400,
        "response_format",
        "invalid_json_schema",
    ),
    ({"extra_body": {"enable_thinking": False}}, 400, "enable_thinking", None),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": [{"role": "system", "content": "a"}]}, 400, "messages", None),
    ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "function", "name": "f", "content": "a"}]}, 400, "messages[0].role", None),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", None),
    ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content", None),
    ({"messages": [{"role": "user", "content": "a", "name": "me"}]}, 400, "messages[0].name", "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, 400, "messages[1]", None),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, 400, "messages", None),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "x"}]}, 400, "messages[0]", None),
    ({"messages": [{"role": "user", "content": "count " * 5000}]}, 400, "messages", "context_length_exceeded"),
]


@streams
@pytest.mark.parametrize(("words", "status", "param", "code"), REFUSED, ids=[f"{json.dumps(case[0])[:60]}" for case in REFUSED])
def test_what_is_refused(scripted: Running, streamed: bool, words: dict[str, Any], status: int, param: str, code: str) -> None:
    before = len(scripted.engine.asks)
    given: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}], "stream": streamed, **words}
    if not streamed or "stream_options" in words:
        given.pop("stream")
    asking = openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0)
    with asking, pytest.raises(openai.APIStatusError) as caught:
        asking.chat.completions.create(**given)
    error: Any = caught.value
    assert (error.status_code, error.param, error.code) == (status, param, code), error.body
    assert error.body["type"] == "invalid_request_error" and len(error.body["message"]) > 10
    assert len(scripted.engine.asks) == before, "nothing is generated"


CALLING = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([CALLING], "messages[1]"),
        ([CALLING, {"role": "tool", "content": "a", "tool_call_id": "c2"}], "messages[2].tool_call_id"),
        ([CALLING, *[{"role": "tool", "content": "a", "tool_call_id": "c1"}] * 2], "messages[3].tool_call_id"),
        ([CALLING, {"role": "tool", "content": "a", "tool_call_id": "c1", "name": "clock"}], "messages[2].name"),
        ([{**CALLING, "tool_calls": CALLING["tool_calls"] * 2}], "messages[1].tool_calls"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "[1]"}}]}],
            "messages[1].tool_calls[0].function.arguments",
        ),
        ([{"role": "assistant", "content": None}], "messages[1].content"),
    ],
)
def test_calls_and_results_must_fit(client: Any, messages: list[Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat([{"role": "user", "content": "hello"}, *messages])
    assert caught.value.param == param
