"""Servers for the tests: one whose engine says what it is told to, and one with the tiny model behind the real engine."""

import asyncio
import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from finery.serve.service import Settings
from serving import PLAIN, Running, Scripted, running, template_for

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SCRIPT = {
    "hello": "Hi there, 你好! 🙂",
    "think": "<think>\nTwo and two.\n</think>\n\nFour.",
    "endless thought": "<think>\nTwo and two",
    "weather": CALL,
    "say first": f"<think>\nI have to look.\n</think>\n\nLet me see.\n{CALL}",
    "two cities": f"{CALL}\n{CALL.replace('Rome', 'Oslo')}",
    "almost": 'I like <tool_ and <b> tags, {"a": 1} and spaces  .  ',
    "broken": "Hm.\n<tool_call>\nno JSON\n</tool_call> so be it",
    "json": '{"ok": true, "color": "red"}',
    "unruly": "I would rather talk about something else, at some length, and not in JSON.",
    "count": " ".join(map(str, range(200))),
    "18 degrees": "It is 18 degrees in Rome.",
}


@pytest.fixture(scope="session", autouse=True)
def no_request_lines() -> None:
    """Servers log from threads of their own, into whatever test runs meanwhile."""
    logging.getLogger("finery.serve.doors").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """The tiny tokenizer, with tokens for thoughts as reasoning models have them."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(str(tiny_model))
    found.add_tokens(["<think>", "</think>"])
    return found


@pytest.fixture(scope="session")
def scripted(tokenizer: Any) -> Iterator[Running]:
    """A server that says what it is told to."""
    template = template_for(tokenizer, "qwen3")
    engine = Scripted(template, SCRIPT, names=("poet",))
    with running(engine, template, Settings("scripted", PLAIN)) as found:
        yield found


@pytest.fixture(scope="session")
def real(tiny_model: Path) -> Iterator[Running]:
    """A server of the tiny model."""
    from finery.commands.chat import open_engine
    from finery.run import Run

    run = Run.from_dict({"model_name_or_path": str(tiny_model), "max_new_tokens": 16})
    engine, template = open_engine(run)
    with running(engine, template, Settings("tiny", run.generation)) as found:
        yield found
    engine.close()


class Client:
    """OpenAI's own client, sync or async; streams come as lists."""

    def __init__(self, url: str, is_async: bool) -> None:
        self.given = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 90.0}
        self.is_async = is_async

    def __call__(self, path: str, **words: Any) -> Any:
        """`client("chat.completions.create", …)`."""
        return asyncio.run(self._async(path, words)) if self.is_async else self._sync(path, words)

    def chat(self, text: str | list[Any], **words: Any) -> Any:
        """A chat about a text."""
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return self("chat.completions.create", **{"model": "scripted", "messages": messages, **words})

    def _sync(self, path: str, words: dict[str, Any]) -> Any:
        with openai.OpenAI(**self.given) as client:
            found = _named(client, path)(**words)
            return list(found) if words.get("stream") else found

    async def _async(self, path: str, words: dict[str, Any]) -> Any:
        async with openai.AsyncOpenAI(**self.given) as client:
            found = await _named(client, path)(**words)
            return [event async for event in found] if words.get("stream") else found


def _named(client: Any, path: str) -> Callable[..., Any]:
    for name in path.split("."):
        client = getattr(client, name)
    return client


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def client(request: pytest.FixtureRequest, scripted: Running) -> Client:
    """Asks the scripted server."""
    return Client(scripted.url, request.param)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def tiny(request: pytest.FixtureRequest, real: Running) -> Client:
    """Asks the server of the tiny model."""
    found = Client(real.url, request.param)
    found.chat = lambda text, **words: Client.chat(found, text, **{"model": "tiny", **words})  # type: ignore[method-assign]
    return found


@pytest.fixture
def plain(tokenizer: Any) -> Any:
    """A template and an engine of one test alone."""
    template = template_for(copy.deepcopy(tokenizer), "qwen3")
    return Scripted(template, dict(SCRIPT)), template


SETTINGS = Settings("m", PLAIN, most_bytes=100_000)


@pytest.fixture
def serve(plain: Any) -> Callable[..., Any]:
    """A server of its own, with the settings that are named."""
    engine, template = plain

    @contextmanager
    def started(**changes: Any) -> Iterator[Running]:
        with running(engine, template, replace(SETTINGS, **changes)) as found:
            yield found

    return started
