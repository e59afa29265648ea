"""Replies that end with their client: whoever goes away is not written for any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from finery.log import get_logger
from finery.serve.refusals import Refusal

log = get_logger(__name__)


def dumped(value: Any) -> bytes:
    """JSON as it goes over the wire."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def refused(refusal: Refusal) -> JSONResponse:
    """A refusal as a response."""
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _gone(receive: Receive) -> None:
    """Ends when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None], most_seconds: float) -> None:
    """Do the work, unless the client goes first, or does not read: it is cancelled then, and has cleaned up when this returns."""
    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, watching}, timeout=most_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (doing, watching):
            task.cancel()
        done = await asyncio.gather(doing, watching, return_exceptions=True)
    if isinstance(done[0], Exception):
        raise done[0]


class WholeReply(Response):
    """One JSON object."""

    def __init__(self, work: Coroutine[Any, Any, Any], close: Callable[[], None], most_seconds: float) -> None:
        """`close` is called at the end in any case."""
        super().__init__()
        self._most_seconds = most_seconds
        self._work = work
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As for Response."""

        async def answer() -> None:
            try:
                response = Response(dumped(await self._work), media_type="application/json")
            except Refusal as refusal:
                response = refused(refusal)
            await response(scope, receive, send)

        try:
            await until_gone(receive, answer(), self._most_seconds)
        finally:
            self._close()
            self._work.close()


class StreamReply(Response):
    """Server-sent events; what goes wrong before the first has a status of its own, what goes wrong later is an event."""

    def __init__(self, events: AsyncIterator[Any], close: Callable[[], None], most_seconds: float) -> None:
        """`close` is called at the end in any case."""
        super().__init__()
        self._most_seconds = most_seconds
        self._events: Any = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As for Response."""
        try:
            await until_gone(receive, self._send(scope, receive, send), self._most_seconds)
        finally:
            self._close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    if not begun:
                        begun = True
                        await send(_START)
                    await send(_body(dumped(event)))
            except Refusal as refusal:
                if not begun:
                    await refused(refusal)(scope, receive, send)
                    return
                await send(_body(dumped(refusal.body)))
            except Exception as error:
                log.error("an answer failed", exc_info=error)
                if not begun:
                    raise
                await send(_body(dumped(Refusal(500, "The server failed; its log tells more.", code="internal_error").body)))
        await send(_body(b"[DONE]"))
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
_START: Message = {"type": "http.response.start", "status": 200, "headers": _HEADERS}


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
