"""What every request passes before it is read: names, key, size, time, and whether the server still takes any."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from hashlib import sha256

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finery.log import get_logger
from finery.serve.refusals import Refusal
from finery.serve.replies import refused
from finery.serve.service import Service

log = get_logger(__name__)

OPEN = frozenset({"/health", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
"""Paths that need no key: they tell nothing of what is served."""
_LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")
_KNOWN = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score/evaluation", "/metrics", *sorted(OPEN))


class Doors:
    """The outermost of the app."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service
        key = service.settings.key
        self._key = sha256(key.encode()).digest() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        service, began, status = self.service, time.monotonic(), [499]

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                if service.draining:
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        service.num_requests += 1
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            try:
                self._look(scope, headers)
            except Refusal as refusal:
                await refused(refusal)(scope, receive, told)
                return
            await self.app(scope, self._limited(scope, headers, receive), told)
        finally:
            service.num_requests -= 1
            seconds = time.monotonic() - began
            path = self._route(scope)
            service.metrics.requests[path, status[0]] += 1
            service.metrics.request_seconds.add(seconds)
            log.info("%s %s %d %.2f s", scope["method"] if scope["method"].isalpha() else "?", path, status[0], seconds)

    def _route(self, scope: Scope) -> str:
        """The path for figures and logs; what a client makes up has no name of its own there."""
        path = self._path(scope)
        return path if path in _KNOWN else "/v1/models" if path.startswith("/v1/models/") else "other"

    def _path(self, scope: Scope) -> str:
        return scope["path"].removeprefix(self.service.settings.root_path) or "/"

    def _look(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Raise `Refusal` for a request that is not to be read."""
        self._look_at_host(headers.get(b"host", b"").decode("latin-1"))
        path = self._path(scope)
        if self._key is not None and path not in OPEN and scope["method"] != "OPTIONS":
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(sha256(key.strip()).digest(), self._key)
            if scheme.lower() != b"bearer" or not right:
                said = "Incorrect API key provided." if key else "No API key provided: send the header 'Authorization: Bearer KEY'."
                raise Refusal(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.service.draining and path != "/metrics":
            raise Refusal(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "10"})
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":  # pages of other sites could send everything else without being asked about it
                raise Refusal(
                    415, "The body must be JSON, with the header 'Content-Type: application/json'.", code="unsupported_media_type"
                )
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size[:20]) > self.service.settings.most_bytes:
            raise self._too_large()

    def _look_at_host(self, host: str) -> None:
        """A page whose name an attacker lets point here must not be able to ask: a browser says by which name it called."""
        hosts = self.service.settings.hosts
        if hosts is None:
            return
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() not in (*_LOCAL, *hosts):
            raise Refusal(403, f"This server is not called {name[:100]!r}; FINERY_API_HOSTS may name it.", code="unknown_host")

    def _too_large(self) -> Refusal:
        return Refusal(413, f"The body may have {self.service.settings.most_bytes:,} bytes.", code="request_too_large")

    def _limited(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> Receive:
        """`receive` with bounds of size and time for the body."""
        size, whole = 0, scope["method"] in ("GET", "HEAD") and b"content-length" not in headers and b"transfer-encoding" not in headers
        until = time.monotonic() + self.service.settings.body_seconds

        async def limited() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, "The body took too long.", code="request_timeout", headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if size > self.service.settings.most_bytes:
                    raise self._too_large()
            return message

        return limited
