"""POST /v1/chat/completions: a conversation in, a message out, whole or piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from finery.data.dialects import DIALECTS
from finery.data.dialects.base import Call, Dialect, dump
from finery.data.reading import Delta, Reader, thought_marks
from finery.engines.base import Ask, Piece, Token
from finery.serve.conversation import conversation
from finery.serve.desk import Answers
from finery.serve.grammars import Form, Start, written_of
from finery.serve.protocol import ChatRequest, NamedTool
from finery.serve.refusals import Refusal, bad
from finery.serve.service import Service
from finery.serve.tokens import chat_logprobs, within

_ANY_OBJECT = {"type": "object"}


@dataclass
class Prepared:
    """A request that can be answered."""

    asks: list[Ask]
    readers: list[Reader]
    forms: list[Form] = field(default_factory=list)


@dataclass
class Choice:
    """What has come of one answer."""

    reader: Reader
    text: str = ""  # as the engine wrote it
    thought: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    num_told: int = 0  # of the tokens, in chunks
    finish: str | None = None

    def take(self, piece: Piece, service: Service) -> Delta:
        """Read a piece of the answer."""
        text = piece.text
        self.tokens += piece.tokens
        if piece.finish is not None:
            end = next((word for word in service.ends if text.endswith(word)), "") if piece.finish == "stop" else ""
            text = text.removesuffix(end)
        self.text += text
        delta = self.reader.feed(text)
        if piece.finish is not None:
            rest = self.reader.finish()
            delta = Delta(delta.thought + rest.thought, delta.content + rest.content, rest.calls)
            self.finish = "tool_calls" if rest.calls else piece.finish
        self.thought += delta.thought
        self.content += delta.content
        self.calls += delta.calls
        return delta

    def logprobs(self, service: Service, stops: bool) -> dict[str, Any] | None:
        """Those of tokens that were not told yet."""
        end = len(self.tokens)
        if self.finish is not None:
            end = max(within(self.tokens, self.text, stops, service.template.stop_ids, service.bytes_of), self.num_told)
        entries = chat_logprobs(self.tokens[self.num_told : end], service.bytes_of)
        self.num_told = end
        return {"content": entries, "refusal": None}


def prepare(service: Service, asked: ChatRequest) -> Prepared:
    """Make prompts, readers and grammars; raises `Refusal` for what cannot be answered. Not for the loop's thread."""
    adapter = service.adapter(asked.model)
    system, messages = conversation(asked.messages)
    service.look_at_size(sum(len(message.content) for message in messages), "messages")
    thinks = _thinks(service, asked)
    tools = [] if asked.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in asked.tools or []]
    for tool in tools:
        tool["function"].pop("strict", None)
    if tools and service.dialect is None:
        said = f"Tools are not supported: {service.template.told} describes none; another 'template' in the run that is served may."
        raise bad(said, "tools", "unsupported_parameter")
    prompt = service.template.prompt_ids(messages, system, dump(tools) if tools else "", thinks)
    opening, closing, tail = thought_marks(service.template, prompt)
    opened = bool(opening) and tail.endswith(opening)
    dialect, make = _form(service, asked, tools, _start(service, opening, closing, tail))
    options = service.options(asked, len(prompt), asked.max_completion_tokens or asked.max_tokens)
    options = options.model_copy(update={"skip_special_tokens": False})
    bare_tools = [tool["function"] for tool in tools]
    prepared = Prepared([], [])
    for number in range(asked.n or 1):
        form = make() if make is not None else None
        prepared.forms += [form] if form is not None else []
        seed = None if asked.seed is None else asked.seed + number
        num_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        prepared.asks.append(Ask(prompt, options, asked.stops, seed, num_logprobs, form, adapter))
        one_call = asked.parallel_tool_calls is False or isinstance(asked.tool_choice, NamedTool)
        prepared.readers.append(Reader(opening, closing, opened, dialect, bare_tools, service.clean, one_call))
    return prepared


def _thinks(service: Service, asked: ChatRequest) -> bool:
    """Whether a thought is asked for."""
    given = service.settings.thinking
    if asked.enable_thinking is None or given is None or asked.enable_thinking == given:
        return bool(asked.enable_thinking)
    raise bad(
        f"'enable_thinking' is {str(given).lower()} in the run that is served; requests choose where it is null there.", "enable_thinking"
    )


def _start(service: Service, opening: str, closing: str, tail: str) -> Start:
    """Where the form of an answer begins: after its thought, if the prompt opens one; after one, if the model can open one by a token."""
    if opening and tail.endswith(opening):
        return Start(closing)
    id = next((id for id, token in service.tokenizer.added_tokens_decoder.items() if token.content == opening), None)
    return Start() if id is None or tail.endswith(closing) else Start(thought=(id, closing))


def _form(
    service: Service, asked: ChatRequest, tools: Sequence[dict[str, Any]], start: Start
) -> tuple[Dialect | None, Callable[[], Form] | None]:
    """How calls are looked for in the answer, and the form that it must have."""
    chosen = asked.response_format
    forced = bool(tools) and asked.tool_choice not in (None, "auto")
    if chosen is not None and chosen.type != "text":
        if tools:
            raise bad("'response_format' with 'tools' is not supported: an answer is either.", "response_format", "unsupported_parameter")
        schema = chosen.json_schema.schema_ if chosen.json_schema is not None else _ANY_OBJECT
        return None, service.grammars.schema(schema or {}, "response_format", start)
    if not tools:
        return None, None
    dialect = service.dialect
    assert dialect is not None
    strict = [bool(tool.function.strict) for tool in asked.tools or []]
    if not forced and not any(strict):
        return dialect, None
    how = written_of(dialect)
    functions = _functions(asked, forced)
    if forced:
        if how is None:  # its arguments are no JSON: the calls are written as such, and read so
            dialect = DIALECTS["mistral"]()
            how = written_of(dialect)
        assert how is not None
        several = asked.parallel_tool_calls is not False and not isinstance(asked.tool_choice, NamedTool)
        return dialect, service.grammars.calls(functions, how, several, start)
    if how is None or not how.mark:
        place = f"tools[{strict.index(True)}].function.strict"
        raise bad(f"{service.template.told} calls tools in a way that cannot be held to a schema: leave 'strict' out.", place)
    return dialect, service.grammars.calls(functions, how, asked.parallel_tool_calls is not False, Start(how.mark))


def _functions(asked: ChatRequest, forced: bool) -> list[tuple[str, dict[str, Any]]]:
    """Names and schemas of what may be called; that a tool is `strict` counts where nothing else holds the call to its schema."""
    found = [(tool.function.name, tool) for tool in asked.tools or []]
    if isinstance(asked.tool_choice, NamedTool):
        found = [(name, tool) for name, tool in found if name == asked.tool_choice.function.name]
        if not found:
            raise bad(f"'tool_choice' names '{asked.tool_choice.function.name}', which is not in 'tools'.", "tool_choice")
    held = [(name, tool.function.parameters if forced or tool.function.strict else None) for name, tool in found]
    return [(name, schema or _ANY_OBJECT) for name, schema in held]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """What a request has used; a prompt counts once, whatever `n` is."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def look_at_forms(forms: Sequence[Form]) -> None:
    """Raise `Refusal` where an answer could not keep its form."""
    for form in forms:
        if form.failure:
            raise Refusal(500, f"The answer could not be held to its form: {form.failure[:300]}", code="form_failed")


async def whole(service: Service, asked: ChatRequest, prepared: Prepared, answers: Answers) -> dict[str, Any]:
    """The response that is not streamed."""
    choices = [Choice(reader) for reader in prepared.readers]
    async with answers:
        async for index, piece in answers:
            choices[index].take(piece, service)
    look_at_forms(prepared.forms)
    told = [
        {
            "index": index,
            "message": _message(choice),
            "logprobs": choice.logprobs(service, bool(asked.stops)) if asked.logprobs else None,
            "finish_reason": choice.finish,
        }
        for index, choice in enumerate(choices)
    ]
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": told,
        "usage": usage(len(prepared.asks[0].prompt_ids), answers.num_tokens),
    }


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.content or (None if choice.calls else ""), "refusal": None}
    if choice.thought:
        message["reasoning_content"] = choice.thought
    if choice.calls:
        message["tool_calls"] = [_call(call) for call in choice.calls]
    return message


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}


async def chunks(service: Service, asked: ChatRequest, prepared: Prepared, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream; the first comes with the first piece."""
    choices = [Choice(reader) for reader in prepared.readers]
    head = {"id": f"chatcmpl-{uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time()), "model": asked.model}
    more = {"usage": None} if asked.tells_usage else {}
    begun = False

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}], **more}

    async with answers:
        async for index, piece in answers:
            if not begun:
                begun = True
                for number in range(len(choices)):
                    yield chunk(number, {"role": "assistant", "content": "", "refusal": None})
            choice = choices[index]
            deltas = list(_deltas(choice.take(piece, service), len(choice.calls)))
            if choice.finish is not None:
                look_at_forms(prepared.forms)
            for number, delta in enumerate(deltas):
                yield chunk(index, delta, None, choice.logprobs(service, bool(asked.stops)) if asked.logprobs and not number else None)
            if choice.finish is not None:
                rest = choice.logprobs(service, bool(asked.stops)) if asked.logprobs else None
                yield chunk(index, {}, choice.finish, rest if rest and rest["content"] else None)
    if asked.tells_usage:
        yield {**head, "choices": [], "usage": usage(len(prepared.asks[0].prompt_ids), answers.num_tokens)}


def _deltas(delta: Delta, num_calls: int) -> list[dict[str, Any]]:
    """What has become certain, as OpenAI's deltas: a call's id and name first, then its arguments."""
    found: list[dict[str, Any]] = []
    if delta.thought:
        found.append({"reasoning_content": delta.thought})
    if delta.content:
        found.append({"content": delta.content})
    for at, call in enumerate(delta.calls, num_calls - len(delta.calls)):
        told = _call(call)
        arguments = told["function"]["arguments"]
        told["function"] = {"name": call.name, "arguments": ""}
        found.append({"tool_calls": [{"index": at, **told}]})
        found.append({"tool_calls": [{"index": at, "function": {"arguments": arguments}}]})
    return found
