"""What every request to a page passes first: who asks, from where, and for what. Pages of other sites and files are refused."""

from __future__ import annotations

import hmac
import shutil
from base64 import b64decode
from binascii import Error
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from http.cookies import SimpleCookie
from tempfile import gettempdir
from urllib.parse import parse_qs, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finery.web.languages import language_in

_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_OPEN = (
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/robots.txt",
    "/gradio_api/queue/join",
    "/gradio_api/queue/data",
    "/gradio_api/startup-events",
    "/gradio_api/reset",
    "/gradio_api/cancel",
)
_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
"""All that a page needs. Gradio also serves files, takes uploads and asks other servers; those ways are shut."""
_SEND, _SEND_PROGRESS = "/gradio_api/upload", "/gradio_api/upload_progress"
"""Opened for a page that takes files."""
_FRAME_BYTES = 64 << 10  # of a request, beside the file that it sends
_FREE_BYTES = 1 << 30  # that a file leaves on the disk
_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}
"""A page that shows what a model says loads nothing from elsewhere, so that no picture's address carries a talk away."""


@dataclass(frozen=True)
class Access:
    """Who may ask: everybody on this machine, or who knows the password."""

    user: str = ""
    password: str = ""
    token: str = ""  # may stand in the page's first address, in place of the password
    root_path: str = ""

    @property
    def is_open(self) -> bool:
        """Whether no password is asked for."""
        return not self.password

    @property
    def cookie(self) -> str:
        """What a browser keeps that came with the token."""
        return sha256(f"finery {self.token}".encode()).hexdigest()


class Gate:
    """The outermost of the app; `uploads_bytes` may be sent at a time."""

    def __init__(self, app: ASGIApp, access: Access, uploads_bytes: int = 0) -> None:
        self.app = app
        self.access = access
        self.uploads_bytes = uploads_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page needs no web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _reply(send, *refusal)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower().decode() not in _HEADERS]
                message = {**message, "headers": [*kept, *((name.encode(), value.encode()) for name, value in _HEADERS.items())]}
            await send(message)

        await self.app(scope, receive, told)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str, dict[str, str]] | None:
        path = scope["path"].removeprefix(self.access.root_path) or "/"
        if (language := language_in(path)) is not None:
            path = path.removeprefix(f"/{language}") or "/"
        host = headers.get("host", "")
        if self.access.is_open and _name(host) not in _LOCAL:
            return 403, "This page is not called by that name.", {}
        if not _is_own(headers, host):
            return 403, "Pages of other sites may not ask.", {}
        token = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if self.access.token and path == "/" and _same(token, self.access.token):
            cookie = f"finery={self.access.cookie}; HttpOnly; SameSite=Lax; Path={self.access.root_path or '/'}"
            return 303, "", {"location": f"{self.access.root_path}/", "set-cookie": cookie}
        if not self.access.is_open and not self._knows(headers):
            return 401, "A password is needed.", {"www-authenticate": 'Basic realm="Finery", charset="UTF-8"'}
        if self.uploads_bytes and path in (_SEND, _SEND_PROGRESS):
            return self._too_much(headers) if path == _SEND else None
        if path.rstrip("/") not in {known.rstrip("/") for known in _OPEN} and not path.startswith(_BELOW):
            return 404, "There is nothing.", {}
        return None

    def _too_much(self, headers: Mapping[str, str]) -> tuple[int, str, dict[str, str]] | None:
        """What keeps a file from being taken, told before any of it is read; the server sees to it that no more comes than was said."""
        length = headers.get("content-length", "")
        if "transfer-encoding" in headers or not length.isdecimal():
            return 411, "Say how long it is.", {}
        if len(length) > 18 or int(length) > self.uploads_bytes + _FRAME_BYTES:
            return 413, f"No more than {self.uploads_bytes >> 20} MB at a time.", {}
        if shutil.disk_usage(gettempdir()).free < int(length) + _FREE_BYTES:
            return 507, "The disk is full.", {}
        return None

    def _knows(self, headers: Mapping[str, str]) -> bool:
        """Whether the request has the password, or the token's cookie."""
        kept = SimpleCookie(headers.get("cookie", "")).get("finery")
        if self.access.token and kept is not None and _same(kept.value, self.access.cookie):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = b64decode(given, validate=True).decode("utf-8").partition(":")
        except (Error, ValueError):
            return False
        return _same(user, self.access.user) & _same(password, self.access.password)


def _same(one: str, other: str) -> bool:
    """Compared in a time that tells nothing."""
    return hmac.compare_digest(sha256(one.encode()).digest(), sha256(other.encode()).digest())


def _name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _is_own(headers: Mapping[str, str], host: str) -> bool:
    """Whether the page itself asks, or a person who opens it. A proxy may have another name for the host, and says so."""
    origin = headers.get("origin")
    if origin is not None:
        return urlsplit(origin).netloc.lower() in {host.lower(), headers.get("x-forwarded-host", host).lower()}
    return headers.get("sec-fetch-site") not in ("cross-site", "same-site") or headers.get("sec-fetch-mode") == "navigate"


async def _reply(send: Send, status: int, text: str, more: Mapping[str, str]) -> None:
    body = (text or HTTPStatus(status).phrase).encode()
    headers = {
        "content-type": "text/plain; charset=utf-8",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        **_HEADERS,
        **more,
    }
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
