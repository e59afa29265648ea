"""The process that serves a page: its address, who may open it, and how it ends."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from finery.addresses import address_of, bound, is_local, not_bound, port_of
from finery.compat import is_on
from finery.errors import UserError
from finery.log import get_logger
from finery.web.gate import Access, Gate
from finery.web.languages import Languages
from finery.web.texts import preferred

log = get_logger(__name__)

_PORT, _NUM_PORTS = 7860, 100
_LAST_SECONDS = 1  # for streams to end when the server does


@dataclass(frozen=True)
class Place:
    """Where a page is, and who may open it."""

    taken: socket.socket
    access: Access
    shares: bool = False  # through Gradio's tunnel

    @property
    def address(self) -> str:
        """What to open on this machine."""
        return self.opened(address_of(self.taken))

    def opened(self, address: str) -> str:
        """An address, with what a browser needs to get in."""
        query = f"/?token={self.access.token}" if self.access.token else ""
        return f"{address}{self.access.root_path}{query}"


def place_for(host: str | None, port: int | None, password: str | None, environment: Mapping[str, str] = os.environ) -> Place:
    """By the command line, then the variables; the address is taken at once. Where others can reach the page, a token is made up."""
    own = "::1" if is_on("GRADIO_IPV6", environment) else "127.0.0.1"
    host = host or environment.get("GRADIO_SERVER_NAME", "").strip() or own
    shares = is_on("GRADIO_SHARE", environment)
    root_path = environment.get("GRADIO_ROOT_PATH", "").strip().rstrip("/")
    user, colon, word = (password or "").partition(":")
    if password is not None and not (user and colon and word):
        raise UserError("'--auth' should be user:password")
    if word:
        access = Access(user, word, "", root_path)
    elif shares or not is_local(host):
        token = secrets.token_urlsafe(24)
        access = Access("finery", token, token, root_path)
    else:
        access = Access(root_path=root_path)
    if port is None and environment.get("GRADIO_SERVER_PORT", "").strip():
        port = port_of("GRADIO_SERVER_PORT", _PORT, environment)
    return Place(_first_free(host) if port is None else bound(host, port, "GRADIO_SERVER_PORT"), access, shares)


def _first_free(host: str) -> socket.socket:
    """The usual port, or the next that is free."""
    for port in range(_PORT, _PORT + _NUM_PORTS - 1):
        try:
            taken = bound(host, port, "GRADIO_SERVER_PORT")
            taken.listen(2048)  # two programs may have taken the same address while neither listened
            return taken
        except (UserError, OSError):
            continue
    return bound(host, _PORT + _NUM_PORTS - 1, "GRADIO_SERVER_PORT")


def app_of(page: Any, place: Place, look: Mapping[str, Any]) -> Gate:
    """A Gradio page as an app behind the gate; `look` is its theme and style."""
    return Gate(_mounted(page, "/", place.access.root_path, look), place.access)


def board_of(draw: Callable[[str], Any], place: Place, look: Mapping[str, Any], uploads_bytes: int = 0) -> Gate:
    """A page that `draw` makes in each language, behind the gate; `uploads_bytes` may be sent to it at a time."""
    root_path = place.access.root_path

    def mounted(language: str) -> FastAPI:
        return _mounted(draw(language), f"/{language}", f"{root_path}/{language}" if root_path else "", look, uploads_bytes)

    own = preferred(os.environ.get("LANG", "").replace("_", "-"))  # it is likeliest to be asked for
    return Gate(Languages(mounted, own, root_path), place.access, uploads_bytes)


def _mounted(page: Any, path: str, root_path: str, look: Mapping[str, Any], uploads_bytes: int = 0) -> FastAPI:
    import gradio as gr

    page.queue(default_concurrency_limit=None)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app, page, path=path, root_path=root_path or None, footer_links=[], allowed_paths=[], blocked_paths=["/"],
        show_error=False, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, run_history=False,
        max_file_size=uploads_bytes or None, **look,
    )  # fmt: skip
    return app


class _Server(uvicorn.Server):
    """Says where the page is when it can be opened."""

    def __init__(self, app: Any, place: Place) -> None:
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_LAST_SECONDS, ws="none")
        )
        self.place = place

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does."""
        await super().startup(sockets)
        if self.started:
            _tell(self.place)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come: to end is what was asked for, and no failure."""
        self.force_exit = self.should_exit
        self.should_exit = True


def _tell(place: Place) -> None:
    print(f"the page is at {place.address}", flush=True)
    if place.access.token:
        print(
            "(others can reach it, so its address has a password in it, made up for this time; --auth user:password sets one)", flush=True
        )
    if place.shares:
        from gradio.networking import setup_tunnel

        host, port = place.taken.getsockname()[:2]
        try:
            shared = setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
            print(f"shared at {place.opened(shared)}", flush=True)
        except Exception as error:
            log.warning("it could not be shared: %s", error)


def serve(app: Any, place: Place) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # streams that are cut off at the end are no errors
    try:
        place.taken.listen(2048)
    except OSError as error:
        host, port = place.taken.getsockname()[:2]
        raise not_bound(host, port, error, "GRADIO_SERVER_PORT") from None
    _Server(app, place).run(sockets=[place.taken])
