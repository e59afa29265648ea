"""Start Finery's servers inside an image, and ask them from outside as their users do."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from http.cookiejar import CookieJar
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from image import Desk

CONFIG = "finery-demo/demo.yaml"
"""What `finery demo` writes, in the image's working folder; every command reads it."""
MOVED = 10_000
"""How far ports are moved when their variable is tried."""
_QUESTION = "Who are you?"
_NOT_YET = (HTTPStatus.UNAUTHORIZED, HTTPStatus.SERVICE_UNAVAILABLE)
"""Statuses of a server that has not told its secret yet, or is not ready."""
_SECRETS = (r"with the key (\S+)", r"[?&]token=(\S+)")
"""How the servers tell what they want of those who come from elsewhere."""


@dataclass(frozen=True)
class Server:
    """A command that answers on a port, and the variable that says which."""

    words: tuple[str, ...]
    variable: str
    port: int
    path: str
    question: bytes | None = None
    """What is sent, as JSON; None: the path is only looked at."""


SERVERS = (
    Server(
        ("api", CONFIG),
        "API_PORT",
        8000,
        "/v1/chat/completions",
        json.dumps({"model": "lora", "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 24, "temperature": 0}).encode(),
    ),
    Server(("webui",), "GRADIO_SERVER_PORT", 7860, "/"),
)


def serve(desk: Desk, container: str, server: Server, port: int, variables: dict[str, str]) -> dict[str, Any]:
    """Start a server inside, ask it from outside on its port, and stop it. A chroot shares this machine's ports: none is translated."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    words = ["finery", *server.words]
    found: dict[str, Any] = {"words": " ".join([*settings, *words]), "port": port}
    print(f"image: {found['words']}", flush=True)
    if answers(port):
        return found | {"state": "failed", "seconds": 0.0, "said": "another program has this port"}
    began, log = time.monotonic(), desk.work / "server.log"
    # It ends by itself if all else fails; in the foreground, so that it stays in the group that is ended here.
    command = desk.inside(container, "env", *settings, "timeout", "--foreground", "--kill-after=5", "600", *words)
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            answer = ask(process, port, server, log, seconds=300)
        finally:
            stop(process)
    good = answer is not None and answer["status"] == HTTPStatus.OK
    found |= {"state": "answered" if good else "failed", "seconds": round(time.monotonic() - began, 1)}
    if still_answers(port, seconds=10):
        return found | {"state": "failed", "said": "it goes on when it is told to end"}
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return found | (answer or {"said": re.sub(r"\s+", " ", "".join(last))})


def answers(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def still_answers(port: int, seconds: float) -> bool:
    """Whether somebody listens there even after some time: a process that was ended takes a moment to go."""
    end = time.monotonic() + seconds
    while there := answers(port):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return there


def ask(process: subprocess.Popen[Any], port: int, server: Server, log: Path, seconds: float) -> dict[str, Any] | None:
    """The first answer; None where the process ended or the time is over."""
    end = time.monotonic() + seconds
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    while process.poll() is None and time.monotonic() < end:
        try:
            with opener.open(_request(port, server, log.read_text(encoding="utf-8", errors="replace")), timeout=60) as answer:
                return {"path": urlsplit(answer.geturl()).path, "status": answer.status, "said": _said(answer.read(), server)}
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in _NOT_YET:
                    return {"path": server.path, "status": error.code, "said": error.read(300).decode(errors="replace")}
        except OSError:  # nobody there yet
            pass
        time.sleep(0.5)
    return None


def _request(port: int, server: Server, told: str) -> urllib.request.Request:
    key, token = (found and found[1] for found in (re.search(pattern, told) for pattern in _SECRETS))
    address = f"http://127.0.0.1:{port}{server.path}" + (f"?token={token}" if token else "")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return urllib.request.Request(address, server.question, headers)


def _said(body: bytes, server: Server) -> str:
    if server.question is None:
        return f"{len(body) / 1000:.0f} kB"
    return repr(json.loads(body)["choices"][0]["message"]["content"].strip())


def stop(process: subprocess.Popen[Any]) -> None:
    """End a server with all its processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=15)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
