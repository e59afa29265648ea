"""One page in several languages: each is drawn when it is first asked for, and is found below its own name (/zh/)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from http.cookies import SimpleCookie
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import Receive, Scope, Send

from finery.web.texts import LANGUAGES, preferred

COOKIE = "finery_language"
"""Holds the language that was chosen in this browser."""


class Languages:
    """An ASGI app; `draw` makes the app of a language, which serves it below `/LANGUAGE/`.

    To change the texts of a page that is open, Gradio takes seconds of the browser's time for a page of this size.
    """

    def __init__(self, draw: Callable[[str], Any], first: str, root_path: str = "") -> None:
        """`first` is drawn at once."""
        self.draw = draw
        self.root_path = root_path
        self._apps = {first: draw(first)}
        self._begun: set[str] = set()
        self._stack = AsyncExitStack()
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; who asks for no language is sent on to that of the browser."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        language = language_in(scope["path"].removeprefix(self.root_path))
        if language is None:
            request = Request(scope)
            kept = SimpleCookie(request.headers.get("cookie", "")).get(COOKIE)
            language = kept.value if kept and kept.value in LANGUAGES else preferred(request.headers.get("accept-language", ""))
            await RedirectResponse(f"{self.root_path}/{language}/", 303)(scope, receive, send)
            return
        await (await self._app(language))(scope, receive, send)

    async def _app(self, language: str) -> Any:
        async with self._turn:
            if language not in self._apps:
                self._apps[language] = await to_thread.run_sync(self.draw, language)
            app = self._apps[language]
            if language not in self._begun:
                await self._stack.enter_async_context(app.router.lifespan_context(app))
                self._begun.add(language)
        return app

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._stack.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def language_in(path: str) -> str | None:
    """The language whose page a path names."""
    first = path.lstrip("/").partition("/")[0]
    return first if first in LANGUAGES else None
