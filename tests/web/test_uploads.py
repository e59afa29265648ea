"""Files that are sent to a board's page: real requests to a real server, friendly and not."""

import asyncio
import contextlib
import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from finery.web.gate import Access, Gate
from finery.web.server import board_of, place_for

LIMIT = 1 << 20
EDGE = "edge"


@pytest.fixture(scope="module")
def port(drawn: Any) -> Iterator[int]:
    """Of a board that takes a megabyte."""
    import uvicorn

    from finery.web.app import LOOK

    place = place_for(None, 0, None, {})

    async def build() -> Gate:
        return board_of(lambda language: drawn.page, place, LOOK, drawn.upload_bytes)

    server = uvicorn.Server(uvicorn.Config(asyncio.run(build()), log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place.taken]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
        assert thread.is_alive()
    yield place.taken.getsockname()[1]
    server.should_exit = server.force_exit = True
    thread.join(10)
    place.taken.close()


def body(*files: tuple[str, bytes]) -> bytes:
    parts = [f'--{EDGE}\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode() + data for name, data in files]
    return b"\r\n".join([*parts, f"--{EDGE}--\r\n".encode()])


def send(port: int, sent: bytes, **headers: str) -> tuple[int, bytes]:
    """POST it, with a length that may be another one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    told = {"content-type": f"multipart/form-data; boundary={EDGE}", "content-length": str(len(sent))}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.putrequest("POST", "/en/gradio_api/upload")
        for name, value in told.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders()
        connection.send(sent)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def stored() -> dict[str, int]:
    """What lies where Gradio keeps what is sent, with its size."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.stat().st_size}


def test_a_file_is_taken(port: int) -> None:
    status, told = send(port, body(("../../up\0 <b>.jsonl", b'{"text": "x"}')))
    (path,) = json.loads(told)
    assert status == 200 and Path(path).read_bytes() == b'{"text": "x"}'
    assert Path(path).resolve().is_relative_to(os.environ["GRADIO_TEMP_DIR"])
    assert "<" not in path and "\0" not in path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_length": str(1 << 30)}, 413),
        ({"content_length": "9" * 18}, 413),
        ({"content_length": "9" * 5000}, 400),
        ({"content_length": "", "transfer_encoding": "chunked"}, 411),
        ({"origin": "http://evil.example"}, 403),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_read(port: int, headers: dict[str, str], status: int) -> None:
    """A gigabyte that is announced, one that is not, and what another site's page sends."""
    before = stored()
    began = time.monotonic()
    sent = b"" if status == 400 else b"--edge\r\n"  # a length that is no number ends the connection: what came after it could reset it
    if "transfer_encoding" in headers:  # a chunk, as the protocol has it
        sent = b"%x\r\n%s\r\n" % (len(sent), sent)
    assert send(port, sent, **headers)[0] == status
    assert time.monotonic() - began < 15  # whoever waited for the rest would answer never: `send` gives up after 20
    assert stored() == before


@pytest.mark.parametrize("files", [[("a.jsonl", b"x" * (LIMIT + 100))], [(f"{name}.jsonl", b"x" * (LIMIT // 2 + 40_000)) for name in "ab"]])
def test_no_more_than_the_limit_is_kept(port: int, files: list[tuple[str, bytes]]) -> None:
    """Of one file, and of several together."""
    before = stored()
    assert send(port, body(*files))[0] == 413
    assert stored() == before


def test_more_than_was_said_is_not_kept(port: int) -> None:
    before = sum(stored().values())
    sent = body(("a.jsonl", b"x" * LIMIT))
    with contextlib.suppress(ConnectionError):  # the server may hang up while the rest is still being sent
        send(port, sent[:400_000], content_length="300")
    assert sum(stored().values()) - before <= 300


@pytest.mark.parametrize("path", ["/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/stream/x", "/proxy=http://x"])
def test_other_ways_stay_shut(port: int, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    assert connection.getresponse().status == 404
    connection.close()


# ------------------------------------------------------------------ without a server


async def _behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"taken"})


def ask(gate: Gate, path: str = "/gradio_api/upload", **given: Any) -> int:
    async def asked() -> int:
        transport = httpx2.ASGITransport(app=gate)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
            return (await client.post(path, content=b"x", **given)).status_code

    return asyncio.run(asked())


def test_only_a_page_that_takes_files_is_open_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/gradio_api/upload", "/gradio_api/upload_progress"):
        assert ask(Gate(_behind, Access()), path) == 404
        assert ask(Gate(_behind, Access(), 1), path) == 200
        assert ask(Gate(_behind, Access("ada", "secret"), 1), path) == 401
        assert ask(Gate(_behind, Access("ada", "secret"), 1), path, auth=("ada", "secret")) == 200
    monkeypatch.setattr("finery.web.gate._FREE_BYTES", 1 << 60)
    assert ask(Gate(_behind, Access(), 1)) == 507
