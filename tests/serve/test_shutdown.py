"""A server that is told to end: new requests are refused, running answers end, and nothing takes for ever."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from finery.addresses import is_local
from finery.cli import main
from finery.commands.api import settings_for
from finery.errors import UserError
from finery.run import Run
from finery.serve.service import Settings, settings_of
from serving import PLAIN, running, until

COUNT = {"model": "m", "messages": [{"role": "user", "content": "count"}], "stream": True}


def test_running_answers_end_and_new_ones_are_refused(plain: Any) -> None:
    engine, template = plain
    with running(engine, template, Settings("m", PLAIN, drain_seconds=90)) as server:
        engine.held_at = 4  # so that its answer is still running when others are refused
        found: list[httpx2.Response] = []
        with httpx2.Client(timeout=60) as kept:
            assert kept.get(f"{server.url}/health").status_code == 200
            thread = threading.Thread(target=lambda: found.append(httpx2.post(f"{server.url}/v1/chat/completions", json=COUNT, timeout=90)))
            thread.start()
            assert until(lambda: engine.num_written > 3)
            server.server.handle_exit(signal.SIGTERM, None)
            refused = kept.post(f"{server.url}/v1/chat/completions", json=COUNT)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
            assert refused.headers["connection"] == "close" and "retry-after" in refused.headers
            assert kept.get(f"{server.url}/health").status_code == 503, "who shares requests out must know"
        engine.freed.set()
        thread.join(120)
        assert found[0].text.rstrip().endswith("[DONE]") and " 199" in "".join(re.findall(r'"content":"([^"]*)"', found[0].text))
        assert server.thread is not None
        server.thread.join(60)
        assert not server.thread.is_alive() and not engine.stopped


@pytest.mark.parametrize("signals", [1, 2])
def test_what_takes_too_long_is_cut_off(plain: Any, signals: int) -> None:
    engine, template = plain
    with running(engine, template, Settings("m", PLAIN, drain_seconds=0.3 if signals == 1 else 600)) as server:
        engine.delay = 0.2
        thread = threading.Thread(target=lambda: _post_anyhow(server.url))
        thread.start()
        assert until(lambda: engine.num_written > 1)
        began = time.monotonic()
        for _ in range(signals):
            server.server.handle_exit(signal.SIGTERM, None)
        assert server.thread is not None
        server.thread.join(30)
        assert not server.thread.is_alive() and time.monotonic() - began < 30, "its end would wait for ten minutes, or for the answer"
        assert until(lambda: bool(engine.stopped))
        thread.join(60)


def _post_anyhow(url: str) -> None:
    with suppress(httpx2.HTTPError):
        httpx2.post(f"{url}/v1/chat/completions", json=COUNT, timeout=90)


def test_the_command_serves_and_ends(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(json.dumps({"model_name_or_path": str(tiny_model), "max_new_tokens": 4}))
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("API_", "FINERY_API"))}
    command = [sys.executable, "-m", "finery", "api", "x.yaml", "--port", "0"]
    variables |= {"API_HOST": "0.0.0.0", "API_MODEL_NAME": "mine", "FASTAPI_ROOT_PATH": "/proxy", "MAX_CONCURRENT": "2"}
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        told = ""
        while "with the key" not in told:
            line = process.stdout.readline()
            assert line, told
            told += line
        url, key = re.search(r"at (\S+)/v1", told), re.search(r"with the key (\S+)", told)
        assert url and key and "serving mine" in told and len(key[1]) >= 32
        headers = {"Authorization": f"Bearer {key[1]}"}
        assert httpx2.get(f"{url[1]}/v1/models", timeout=60).status_code == 401
        assert httpx2.get(f"{url[1]}/v1/models", headers=headers, timeout=60).json()["data"][0]["id"] == "mine"
        body = {"model": "mine", "messages": [{"role": "user", "content": "Who?"}]}
        assert httpx2.post(f"{url[1]}/v1/chat/completions", json=body, headers=headers, timeout=90).status_code == 200
        assert httpx2.get(f"{url[1]}/proxy/v1/models", headers=headers, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        told += process.stdout.read()
    assert "Traceback" not in told and "Who?" not in told


def test_a_port_that_is_taken(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["api", f"model_name_or_path={tiny_model}", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: another program listens there" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("127.8.8.8", True)])
def test_what_only_this_machine_reaches(host: str, local: bool) -> None:
    assert is_local(host) is local


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "my.lan", "localhost.evil.example"])
def test_a_key_is_made_up_where_others_reach_the_server(host: str) -> None:
    run = Run.from_dict({"model_name_or_path": "a/b"})
    one, other = (settings_for(run, host, {}) for _ in range(2))
    assert not is_local(host) and len(one.key) >= 32 and one.key != other.key
    assert settings_for(run, host, {"API_KEY": "mine"}).key == "mine"


def test_settings_of_the_environment() -> None:
    run = Run.from_dict({"model_name_or_path": "some/model"})
    found = settings_for(run, "127.0.0.1", {"API_KEY": "", "FINERY_CORS_ORIGINS": "https://a.example, https://b.example"})
    assert (found.key, found.hosts, found.origins) == (None, (), ("https://a.example", "https://b.example"))
    assert (found.name, found.max_concurrent, found.verbose) == ("some/model", None, False)
    assert settings_of({"MAX_CONCURRENT": "3", "FINERY_API_SECONDS": "1.5"}) == {"max_concurrent": 3, "most_seconds": 1.5}
    with pytest.raises(UserError, match="MAX_CONCURRENT should be a number above 0, found 'many'"):
        settings_of({"MAX_CONCURRENT": "many"})


@pytest.mark.parametrize("port", ["x", "-1", "70000"])
def test_a_port_that_is_none(port: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("API_PORT", port)
    assert main(["api", f"model_name_or_path={tiny_model}"]) == 2
    assert "'API_PORT' should be a port" in capsys.readouterr().err
