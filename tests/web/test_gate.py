"""Who may open a page, and what it gives away."""

import base64
from typing import Any

import httpx2
import pytest

from finery.errors import UserError
from finery.web.gate import Access, Gate
from finery.web.server import place_for


async def _behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"no")]})
    await send({"type": "http.response.body", "body": b"the page"})


def ask(access: Access, path: str = "/", method: str = "GET", host: str = "127.0.0.1:7860", **headers: str) -> httpx2.Response:
    """What the gate says, asked without a server."""
    import asyncio

    async def asked() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=Gate(_behind, access))
        async with httpx2.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return asyncio.run(asked())


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


OPEN = Access()
LOCKED = Access("ada", "pä:ss")
TOKEN = Access("finery", "secret", "secret")


def test_a_page_on_this_machine_is_open_to_it_alone() -> None:
    assert ask(OPEN).text == "the page"
    assert ask(OPEN, host="localhost:7860").status_code == 200
    assert ask(OPEN, host="evil.example:7860").status_code == 403, "a name that was bent to this machine"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_sites_are_refused(headers: dict[str, str], method: str) -> None:
    assert ask(OPEN, "/gradio_api/queue/join", method, **headers).status_code == 403


def test_its_own_page_and_a_person_who_opens_it_may_ask() -> None:
    assert ask(OPEN, "/gradio_api/queue/join", "POST", origin="http://127.0.0.1:7860", sec_fetch_site="same-origin").status_code == 200
    assert ask(OPEN, sec_fetch_site="cross-site", sec_fetch_mode="navigate").status_code == 200
    proxied = {"origin": "https://my.example", "x_forwarded_host": "my.example", "authorization": basic("ada:pä:ss")}
    assert ask(LOCKED, "/gradio_api/queue/join", "POST", **proxied).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/upload",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/component_server",
        "/gradio_api/run/predict",
        "/monitoring",
        "/assets/../gradio_api/file=/etc/passwd",
        "/docs",
    ],
)
def test_ways_to_files_are_shut(path: str) -> None:
    assert ask(OPEN, path).status_code == 404
    assert ask(OPEN, path, "POST").status_code == 404


def test_a_password_is_asked_for() -> None:
    refused = ask(LOCKED, host="my.example")
    assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
    for wrong in ("ada:", "ada:no", "eve:pä:ss", ":"):
        assert ask(LOCKED, authorization=basic(wrong)).status_code == 401
    for broken in ("Basic", "Basic !", "Bearer x", "Basic /w=="):
        assert ask(LOCKED, authorization=broken).status_code == 401
    assert ask(LOCKED, host="my.example", authorization=basic("ada:pä:ss")).text == "the page"
    assert ask(LOCKED, "/?token=").status_code == 401


def test_a_token_in_the_address_becomes_a_cookie() -> None:
    assert ask(TOKEN).status_code == 401
    assert ask(TOKEN, "/?token=wrong").status_code == 401
    let_in = ask(TOKEN, "/?token=secret")
    assert (let_in.status_code, let_in.headers["location"]) == (303, "/"), "the token leaves the address"
    cookie = let_in.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "secret" not in cookie
    assert ask(TOKEN, cookie=cookie.partition(";")[0]).text == "the page"
    assert ask(TOKEN, cookie="finery=wrong").status_code == 401
    assert ask(TOKEN, authorization=basic("finery:secret")).text == "the page"


def test_a_page_loads_nothing_from_elsewhere() -> None:
    policy = ask(OPEN).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http:" not in policy and "*" not in policy


def place(environment: dict[str, str], host: str | None = None, port: int | None = 0, password: str | None = None) -> Any:
    found = place_for(host, port, password, environment)
    found.taken.close()
    return found


def test_where_a_page_is() -> None:
    assert place({}).access.is_open
    assert place({"GRADIO_SERVER_NAME": "localhost"}).access.is_open
    assert place({}, password="ada:x").access == Access("ada", "x")
    others = place({"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ROOT_PATH": "/chat/"})
    again = place({}, "0.0.0.0")
    assert len(others.access.token) >= 32 and others.access.token != again.access.token
    assert others.opened("http://x") == f"http://x/chat/?token={others.access.token}"
    assert not place({"GRADIO_SHARE": "1"}).access.is_open, "others can reach what is shared"
    for bad in ("ada", "ada:", ":x", ""):
        with pytest.raises(UserError, match="user:password"):
            place({}, password=bad)


def test_which_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="GRADIO_SERVER_PORT"):
        place({"GRADIO_SERVER_PORT": "x"}, port=None)
    first = place_for(None, None, None, {})
    second = place_for(None, None, None, {})
    one, other = first.taken.getsockname()[1], second.taken.getsockname()[1]
    assert 7860 <= one < other < 7960, "the next one, where another program has the usual port"
    with pytest.raises(UserError, match="another program listens there: name another port with --port or GRADIO_SERVER_PORT"):
        place({"GRADIO_SERVER_PORT": str(one)}, port=None)
    first.taken.close()
    second.taken.close()
