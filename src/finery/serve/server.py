"""The process that serves: its address, how it begins and how it ends."""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from finery.errors import UserError
from finery.log import get_logger
from finery.serve.service import Service

log = get_logger(__name__)

_LAST_SECONDS = 3  # for what is cut off to end in order


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """The address, taken before anything is loaded; raises `UserError` where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise _not_bound(host, port, error) from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        found.close()
        raise _not_bound(host, port, error) from None
    return found


def _not_bound(host: str, port: int, error: Exception) -> UserError:
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        why = "another program listens there: name another port with --port or API_PORT"
    return UserError(f"cannot listen on {host} port {port}: {why}")


def address_of(taken: socket.socket) -> str:
    """Where a client finds the server."""
    host, port = taken.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


class Server(uvicorn.Server):
    """Told to end, it refuses new requests with 503, lets running ones end, and cuts off those that take too long.

    Told twice, it ends at once.
    """

    def __init__(self, app: Any, service: Service, started: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=_LAST_SECONDS,
                h11_max_incomplete_event_size=65_536,
            )
        )
        self._service = service
        self._told = started
        self._until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does; then says that it has begun."""
        await super().startup(sockets)
        if self.started:
            self._told()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._until = time.monotonic() + self._service.settings.drain_seconds
        log.info("%s: answers end, new requests are refused; once more to end at once", signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._until is not None and (not self._service.num_requests or time.monotonic() > self._until):
            self.should_exit = True
        return await super().on_tick(counter)


def serve(server: Server, taken: socket.socket) -> None:
    """Serve until told to end."""
    try:
        taken.listen(2048)  # two programs may have taken the same address while neither listened
    except OSError as error:
        host, port = taken.getsockname()[:2]
        raise _not_bound(host, port, error) from None
    server.run(sockets=[taken])
