"""A browser for the tests of pages, and a chat page whose model says what it is told to."""

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finery.talks.speaker import Speaker
from serving import Scripted, template_for

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome ``` <b>"}}\n</tool_call>'
SCRIPT = {
    "hello": "Hi there, 你好!",
    "think": '<think>\nTwo & <b>two</b>.\n\n</details><img src=x onerror="window.hit=1">\n</think>\n\nFour.',
    "attack": 'See <script>window.hit = 1</script><img src="http://192.0.2.1/x.png" onerror="window.hit = 1"> and `<i>code</i>`.\n\n'
    "```html\n<b>fenced</b>\n```\n\n![pic](http://192.0.2.1/y.png) a < b &amp; c",
    "weather": f"Let me see.\n{CALL}",
    "18 degrees": "It is 18 degrees in Rome.",
    "count": " ".join(map(str, range(2000))),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window; FINERY_CHROMIUM names one that is not found by itself.

    Of one module: while it is there, a loop runs in the main thread, in which no other test can run one.
    """
    pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
    found = os.environ.get("FINERY_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("needs a Chromium (Debian: apt-get install chromium), or FINERY_CHROMIUM that names one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@dataclass
class Shown:
    """A page at work."""

    url: str
    engine: Scripted
    place: Any


@pytest.fixture(scope="session")
def speaker(tiny_model: Path) -> Speaker:
    """Who says what the script says, in a template that thinks and calls."""
    from transformers import AutoTokenizer

    from finery.run import Run

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    tokenizer.add_tokens(["<think>", "</think>"])
    template = template_for(tokenizer, "qwen3")
    run = Run.from_dict({"model_name_or_path": "some/model", "template": "qwen3", "max_new_tokens": 5000})
    return Speaker(Scripted(template, SCRIPT, longest=9000), template, run)


@pytest.fixture(scope="session")
def webchat(speaker: Speaker) -> Iterator[Shown]:
    """The page of `finery webchat`, on a free port."""
    import uvicorn

    from finery.web.server import app_of, place_for
    from finery.web.webchat import build, look

    place = place_for(None, 0, None, {})
    servers: list[uvicorn.Server] = []

    async def serve() -> None:  # gradio makes loops that it never closes where none is running while it builds
        app = app_of(build(speaker), place, look())
        servers.append(uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1)))
        await servers[0].serve(sockets=[place.taken])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not servers or not servers[0].started:
        time.sleep(0.02)
        assert thread.is_alive()
    engine: Any = speaker.engine
    yield Shown(place.address, engine, place)
    servers[0].should_exit = servers[0].force_exit = True
    thread.join(10)
    place.taken.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a board may touch."""
    (tmp_path / "home").mkdir()
    (tmp_path / "gradio").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def board(home: Path) -> Any:
    """A board that is not drawn."""
    from finery.web.board import Board
    from finery.web.roots import Roots

    return Board(Roots([home]))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A board with its page, which is in `page`."""
    import asyncio

    from finery.web import app
    from finery.web.board import Board
    from finery.web.roots import Roots
    from finery.web.uploads import uploads_folder

    async def build() -> Any:  # where no loop runs, Gradio makes some and leaves them open
        return app.build(made)

    made = Board(Roots([tmp_path_factory.mktemp("board")]), upload_bytes=1 << 20)
    with uploads_folder():
        made.page = asyncio.run(build())  # type: ignore[attr-defined]
        yield made
