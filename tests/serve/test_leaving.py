"""Whoever goes away is not written for, and what fails is told to the client and to nobody else."""

import asyncio
import json
import logging
import socket
from typing import Any

import httpx2
import pytest

from serving import HELLO, Scripted, post, until


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes_stops_the_engine(serve: Any, streamed: bool, path: str) -> None:
    body = {"model": "m", "stream": streamed, "n": 2}
    body |= {"messages": [{"role": "user", "content": "count"}]} if path.startswith("chat") else {"prompt": "count"}
    with serve() as server:
        server.engine.delay = 0.05
        data = json.dumps(body).encode()
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + data)
            assert until(lambda: server.engine.num_written > 4)
            num_written = server.engine.num_written
        assert until(lambda: len(server.engine.stopped) == 2), "both answers end"
        assert server.engine.num_written - num_written <= 2 * 20, "within a second, by the engine's own clock: 20 tokens of each"
        assert until(lambda: server.service.desk.admitted == server.service.num_requests == 0)
        assert "finery_cancelled_total 2" in httpx2.get(f"{server.url}/metrics", timeout=60).text


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_an_engine_that_fails(serve: Any, plain: Any, streamed: bool) -> None:
    engine: Scripted = plain[0]
    with serve() as server:
        engine.fails = RuntimeError("the secret of the house")
        found = post(server, HELLO | {"stream": streamed})
        assert found.status_code == 500 and found.json()["error"]["type"] == "server_error"
        assert "secret" not in found.text
        engine.fails = None
        assert post(server, HELLO).status_code == 200 and until(lambda: server.service.desk.admitted == 0)


def test_prompts_are_logged_only_where_asked(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("finery").propagate = True
    doors = logging.getLogger("finery.serve.doors")
    doors.setLevel(logging.INFO)
    try:
        secret = HELLO | {"messages": [{"role": "user", "content": "my secret hello"}]}
        with caplog.at_level(logging.DEBUG), serve() as server:
            for body in (secret, secret | {"stream": True}, secret | {"nonsense": "secret"}, secret | {"temperature": "secret"}):
                post(server, body)
            post(server, secret, path="/v1/secret?secret=1")
        told = " ".join(record.getMessage() for record in caplog.records if not record.name.startswith(("http", "asyncio")))
        assert "POST /v1/chat/completions 200" in told and "POST other 404" in told and "secret" not in told
        with caplog.at_level(logging.INFO), serve(verbose=True) as server:
            post(server, secret)
        assert "my secret hello" in caplog.text
    finally:
        logging.getLogger("finery").propagate = False
        doors.setLevel(logging.WARNING)


def test_a_client_that_never_reads_is_left() -> None:
    from finery.serve.replies import until_gone

    left: list[str] = []

    async def send_for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            left.append("cleaned up")

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(until_gone(receive, send_for_ever(), 0.05), 60))
    assert left == ["cleaned up"]


def test_a_client_that_goes_while_it_asks(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    with serve() as server:
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        for part in (head[:30], head, head + b"{"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(part)
                assert part == head[:30] or until(lambda: server.service.num_requests == 1)
            assert until(lambda: server.service.num_requests == 0)
        assert post(server, HELLO).status_code == 200
    assert "Traceback" not in caplog.text
