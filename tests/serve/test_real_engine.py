"""The tiny model behind the real engine, asked by OpenAI's client."""

import json
import math
import time
from typing import Any

import openai
import pytest

from serving import FORMAT, Running, read, until

streams = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


@streams
def test_the_real_engine_answers(tiny: Any, streamed: bool) -> None:
    found = read(tiny, streamed, "Who are you?", temperature=0, max_tokens=8)
    assert found["finish"] in ("stop", "length")
    assert found["content"] == read(tiny, not streamed, "Who are you?", temperature=0, max_tokens=8)["content"]


def test_the_real_engine_draws_by_a_seed(tiny: Any) -> None:
    one, same, other = (read(tiny, False, "Who?", seed=seed, temperature=1.5, top_p=1)["content"] for seed in (1, 1, 2))
    assert one == same != other


@streams
def test_the_real_engine_keeps_a_form(tiny: Any, streamed: bool) -> None:
    found = read(tiny, streamed, "Who?", response_format=FORMAT, max_tokens=60, seed=3)
    assert json.loads(found["content"]).keys() == {"ok", "color"} and found["finish"] == "stop"


def test_the_real_engine_tells_logprobs(tiny: Any) -> None:
    found = read(tiny, True, "Who?", logprobs=True, top_logprobs=5, max_tokens=4, temperature=0)["logprobs"]
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in found)
    assert all(sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001 for entry in found)


def test_the_real_engine_completes_and_embeds(tiny: Any, real: Running) -> None:
    found = tiny("completions.create", model="tiny", prompt=["The quick", "Who are"], max_tokens=4, temperature=0, n=2)
    assert len(found.choices) == 4 and found.choices[0].text == found.choices[1].text
    assert found.usage.prompt_tokens == sum(len(real.engine.tokenizer(text)["input_ids"]) for text in ("The quick", "Who are"))
    whole = tiny("embeddings.create", model="tiny", input=["The quick", "Who are"], encoding_format="float")
    coded = tiny("embeddings.create", model="tiny", input="The quick")
    assert [len(entry.embedding) for entry in whole.data] == [32, 32]
    assert coded.data[0].embedding == pytest.approx(whole.data[0].embedding, abs=1e-5)
    with pytest.raises(openai.BadRequestError) as caught:
        tiny("embeddings.create", model="tiny", input="The quick", dimensions=8)
    assert caught.value.param == "dimensions"


def test_the_real_engine_answers_many_at_once(real: Running) -> None:
    import asyncio

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
            one: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12}
            texts = ["Who?", "What is this?", "The quick brown"] * 4
            tasks = [client.chat.completions.create(messages=[{"role": "user", "content": text}], **one) for text in texts]
            return [found.choices[0].message.content for found in await asyncio.gather(*tasks)]

    found = asyncio.run(ask())
    assert found[:3] == found[3:6] == found[6:9] == found[9:]


def test_the_real_engine_stops_when_a_stream_is_left(real: Running) -> None:
    steps: list[int] = []

    def step(*_: Any) -> None:
        steps.append(1)
        time.sleep(0.02)  # the whole answer would take ten seconds: time enough to leave it, on a busy machine too

    def is_still() -> bool:
        num = len(steps)
        time.sleep(0.3)
        return len(steps) == num

    hook = real.engine.model.register_forward_pre_hook(step)
    try:
        with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
            words: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 480, "stream": True}
            # a form that never ends: the answer would have all of its tokens
            form = {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "array", "items": {"const": 1}, "minItems": 400}},
            }
            stream = client.chat.completions.create(response_format=form, **words)  # type: ignore[call-overload]
            for _ in zip(range(5), stream, strict=False):
                pass
            stream.close()
        assert until(lambda: real.service.desk.running == 0)
        assert until(is_still) and len(steps) < 400
    finally:
        hook.remove()
