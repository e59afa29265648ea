"""OpenAI's shapes of requests. What is not listed here is refused: a field that had no effect would be a silent lie."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME = r"^[A-Za-z0-9_.-]{1,64}$"
Unused = Any
"""OpenAI says of these that they do not change the answer."""


class Shape(BaseModel):
    """An object of a request; unknown fields are refused, and `"1"` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class FunctionCall(Shape):
    """A call in a conversation; the arguments are JSON text."""

    name: Annotated[str, Field(pattern=NAME)]
    arguments: str


class ToolCall(Shape):
    """A call with the id to which its result refers."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Part(BaseModel):
    """A part of a message; only texts are answered, so that others are told of in words and not as unknown fields."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class ChatMessage(Shape):
    """A message of any role; which of its fields a role has is looked at later."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[None] | None = None
    function_call: None = None


class Function(Shape):
    """A tool's schema."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    """OpenAI's wrapping of a schema."""

    type: Literal["function"]
    function: Function


class NamedFunction(Shape):
    """Which function."""

    name: str


class NamedTool(Shape):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JSONSchema(Shape):
    """The form of an answer."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Shape):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _schema_where_one_is_meant(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' belongs to the type json_schema, which needs it")
        if self.json_schema is not None and self.json_schema.schema_ is None:
            raise ValueError("'json_schema' should hold a 'schema'")
        return self


class StreamOptions(Shape):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Drawing(Shape):
    """How tokens are drawn: fields that chats and completions share. What is absent or null is as the run's own keys say."""

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    user: Unused = None
    # not OpenAI's
    do_sample: bool | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _what_belongs_together(self) -> Self:
        if self.logit_bias:
            raise ValueError("'logit_bias' is not supported by this server: leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' belongs to 'stream': true")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Drawing):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    enable_thinking: bool | None = None  # not OpenAI's

    @model_validator(mode="after")
    def _what_fits(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' belongs to 'logprobs': true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("'max_tokens' and 'max_completion_tokens' are the same: give one")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("'tool_choice' asks for a tool, and there are no 'tools'")
        return self


class CompletionRequest(Drawing):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: None = None
    best_of: None = None

    @model_validator(mode="after")
    def _what_fits(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("'echo' with 'logprobs' is not supported by this server: a prompt's tokens are not scored")
        return self


class EmbeddingRequest(Shape):
    """POST /v1/embeddings."""

    model: Annotated[str, Field(min_length=1)]
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    user: Unused = None
