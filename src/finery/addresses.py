"""Where a server listens: addresses taken before anything is loaded, and how others call them."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping

from finery.errors import UserError


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int, variable: str) -> socket.socket:
    """The address, taken; raises `UserError` where it cannot be had. `variable` is the one that may name another port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise not_bound(host, port, error, variable) from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        found.close()
        raise not_bound(host, port, error, variable) from None
    return found


def not_bound(host: str, port: int, error: Exception, variable: str) -> UserError:
    """What to say where an address cannot be had."""
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        why = f"another program listens there: name another port with --port or {variable}"
    return UserError(f"cannot listen on {host} port {port}: {why}")


def address_of(taken: socket.socket) -> str:
    """Where a client finds the server."""
    host, port = taken.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def port_of(variable: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """The port that a variable names; raises `UserError` where it is none."""
    text = environment.get(variable, "").strip() or str(default)
    if not text.isdigit() or int(text) > 65535:
        raise UserError(f"{variable!r} should be a port, 0 to 65535, found {text!r}")
    return int(text)
