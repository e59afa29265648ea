"""What a client is told when it gets no answer: OpenAI's error shape, with a status and a text that says what would do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

UNSUPPORTED = {
    *("audio", "best_of", "dimensions", "function_call", "functions", "logit_bias", "modalities", "moderation", "prediction", "suffix"),
    *("prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "verbosity", "web_search_options"),
}
"""Fields that OpenAI has and this server does not."""
_INNER = re.compile(
    r"str|int|float|bool|none|constrained-\w+|dict\[.*|[A-Z]\w*|(literal|list|tuple|function-[\w-]+|lax-or-strict|nullable|json-or-python)\[.*"
)
"""Steps to a value that name a type which was tried."""


class Refusal(Exception):
    """A request that is not answered."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's `type` of an error."""
        named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return named.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """What the client can mend in its request."""
    return Refusal(400, message, param, code)


def of_validation(error: ValidationError) -> Refusal:
    """The first thing that is wrong with a request's shape."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"].startswith("json_invalid"):
        return bad(f"The body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    param = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        if param in UNSUPPORTED:
            return bad(f"This server does not support '{param}': leave it out.", param, "unsupported_parameter")
        return bad(f"Unknown parameter: '{param}'.", param, "unknown_parameter")
    if first["type"] == "missing":
        return bad(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # says itself what it is about
        named = re.match(r"'(\w+)'", said)
        param = ".".join(filter(None, [param, named[1] if named else ""]))
        return bad(f"{said}.", param or None, "unsupported_parameter" if "not supported" in said else "invalid_value")
    return bad(f"Invalid value for '{param}': {said[:1].lower()}{said[1:]}.", param or None, "invalid_value")


def _place(steps: tuple[int | str, ...]) -> str:
    """`messages[0].content` from the steps to a value, without the names of the types that were tried."""
    text = ""
    for at, step in enumerate(steps):
        if isinstance(step, int):
            text += f"[{step}]"
        elif at == 0 or not _INNER.fullmatch(step):
            text += f".{step}" if text else step
    return text
