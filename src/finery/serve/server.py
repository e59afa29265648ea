"""The process that serves: its address, how it begins and how it ends."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from finery.addresses import not_bound
from finery.log import get_logger
from finery.serve.service import Service

log = get_logger(__name__)

_LAST_SECONDS = 3  # for what is cut off to end in order


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
        raise not_bound(host, port, error, "API_PORT") from None
    server.run(sockets=[taken])
