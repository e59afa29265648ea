"""What the tests of the server share: an engine that says what it is told to, and servers on a port of their own."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np

from finery.addresses import address_of, bound
from finery.data.template import Template
from finery.engines.base import Ask, Engine, GenerationOptions, Piece, Stream, Token
from finery.engines.functions.writing import Writer
from finery.serve.app import build_app
from finery.serve.server import Server
from finery.serve.service import Service, Settings

PLAIN = GenerationOptions.model_validate({})
"""A run's keys where it gives none."""


class Scripted(Engine):
    """Answers with the text of the last word of `script` that stands in the prompt; remembers what it was asked and what was stopped."""

    def __init__(self, template: Template, script: dict[str, str], longest: int = 4096, names: Sequence[str] = ()) -> None:
        self.template = template
        self.tokenizer: Any = template.tokenizer
        self.script = script
        self.most = longest
        self.names = names
        self.delay = 0.0
        self.held_at: int | None = None  # it writes no more than so many tokens before it is `freed`
        self.freed = threading.Event()
        self.asks: list[Ask] = []
        self.prompts: list[str] = []
        self.stopped: list[float] = []
        self.num_written = 0
        self.fails: BaseException | None = None

    @property
    def adapters(self) -> Sequence[str]:
        return self.names

    @property
    def longest(self) -> int:
        return self.most

    def begin(self, ask: Ask) -> Stream:
        self.asks.append(ask)
        prompt = str(self.tokenizer.decode(ask.prompt_ids))
        self.prompts.append(prompt)
        found = max(self.script, key=prompt.rfind)
        answer = self.script[found] if found in prompt else "I have no answer to that."
        stream = Stream()
        threading.Thread(target=self._write, args=(ask, stream, answer), daemon=True).start()
        return stream

    def _write(self, ask: Ask, stream: Stream, answer: str) -> None:
        ids = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], min(self.template.stop_ids)]
        writer = Writer(self.tokenizer, ask.options.skip_special_tokens, ask.stop)
        for number, wanted in enumerate(ids):
            time.sleep(self.delay)
            if self.held_at is not None and self.num_written >= self.held_at:
                self.freed.wait(120)
            if stream.cancelled:
                self.stopped.append(time.monotonic())
                return
            if self.fails is not None:
                stream.put(self.fails)
                return
            id = self._held(ask, wanted)
            if id in self.template.stop_ids:
                stream.put(Piece(writer.end(), (), "stop"))
                return
            self.num_written += 1
            text = writer.add(id)
            is_last = number + 1 in (ask.options.max_new_tokens, len(ids))
            text += writer.end() if is_last else ""
            finish = "stop" if writer.stopped else "length" if is_last else None
            likeliest = [(id, -0.5), (0, -2.0)][: ask.num_logprobs or 0]
            stream.put(Piece(text, [Token(id, -0.5 if ask.num_logprobs is not None else None, likeliest)], finish))
            if finish is not None:
                return

    def _held(self, ask: Ask, wanted: int) -> int:
        """The token, or another that the form allows in its place."""
        if ask.constraint is None:
            return wanted
        allowed = ask.constraint.allowed()
        id = wanted if allowed is None or wanted in allowed else int(allowed[0])
        ask.constraint.take(id)
        return id

    def close(self) -> None:
        pass

    def embed(self, prompts: Sequence[Sequence[int]]) -> Any:
        return np.array([[len(prompt), 0.5] for prompt in prompts], dtype=np.float32)


@dataclass
class Running:
    """A server at work."""

    url: str
    service: Service
    server: Server
    engine: Any = None
    thread: threading.Thread | None = field(default=None, repr=False)


@contextmanager
def running(engine: Engine, template: Template, settings: Settings) -> Iterator[Running]:
    """Serve on a free port of this machine, in a thread."""
    app = build_app(engine, template, settings)
    taken = bound("127.0.0.1", 0, "API_PORT")
    taken.listen()
    server = Server(app, app.state.service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    try:
        yield Running(address_of(taken), app.state.service, server, engine, thread)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)
        app.state.service.close()
        taken.close()


def template_for(tokenizer: Any, name: str, **options: Any) -> Template:
    """A named template on a tokenizer that stays as it was."""
    from finery.data.template import TemplateOptions, load_template

    return load_template(TemplateOptions(template=name, **options), copy.deepcopy(tokenizer))


def until(holds: Any, seconds: float = 30.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return bool(holds())


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "color": {"enum": ["red", "green"]}},
    "required": ["ok", "color"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


def joined(events: list[Any], index: int = 0) -> dict[str, Any]:
    """A stream put together as clients do it."""
    found: dict[str, Any] = {"role": None, "content": "", "thought": "", "calls": {}, "finish": None, "logprobs": []}
    for event in events:
        assert event.object == "chat.completion.chunk" and event.id and event.created
        for choice in (choice for choice in event.choices if choice.index == index):
            assert found["finish"] is None, "nothing comes after the end"
            found["role"] = choice.delta.role or found["role"]
            assert found["role"] == "assistant", "the role comes first"
            found["content"] += choice.delta.content or ""
            found["thought"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert call.index == len(found["calls"]) and call.type == "function"
                    found["calls"][call.index] = {"id": call.id, "name": call.function.name, "arguments": ""}
                found["calls"][call.index]["arguments"] += call.function.arguments or ""
            found["finish"] = choice.finish_reason
            found["logprobs"] += choice.logprobs.content if choice.logprobs else []
    return found


def read(client: Any, streamed: bool, text: Any, **words: Any) -> dict[str, Any]:
    """An answer in the shape of `joined`, whichever way it comes."""
    if streamed:
        return joined(client.chat(text, stream=True, **words))
    choice = client.chat(text, **words).choices[0]
    message = choice.message
    calls = [{"id": call.id, "name": call.function.name, "arguments": call.function.arguments} for call in message.tool_calls or []]
    logprobs = choice.logprobs.content if choice.logprobs else []
    thought = getattr(message, "reasoning_content", "")
    found = {"role": message.role, "content": message.content or "", "thought": thought, "calls": dict(enumerate(calls))}
    return found | {"finish": choice.finish_reason, "logprobs": logprobs}


HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def post(server: Running, body: Any, path: str = "/v1/chat/completions", **words: Any) -> httpx2.Response:
    return httpx2.post(server.url + path, json=body, timeout=90, **words)
