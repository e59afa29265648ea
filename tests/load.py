"""A mixed load on `finery api`: whole answers, streams, streams that are left, tools, forms, and requests that must be refused.

`python tests/load.py --minutes 30 --clients 32` serves the real demo model, prints a JSON report and ends with 1 where a request had
another answer than it must have, or where the server's resident memory has grown: the mean of the last quarter of the time is compared
with that of the second one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import requests

GROWTH = 0.03
"""How much more memory there may be."""
EVERY_SECONDS = 2.0
WORDS = ("Who are you?", "What is 3 plus 4?", "Write about the sea.", "你是谁？", "Name three colours.", "Why is the sky blue?")
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}}
FORM = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"], "additionalProperties": False}
BUSY = 429
"""An answer that is always right: the queue is full, come again."""


class Load:
    """What has come back so far."""

    def __init__(self, address: str, model: str) -> None:
        self.address, self.model = address, model
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def client(self, number: int) -> None:
        """One after the other until the time is over."""
        dice, session = random.Random(number), requests.Session()
        while not self.ended.is_set():
            action = dice.choice(ACTIONS)
            try:
                fault = action(self, session, dice)
            except requests.RequestException as error:
                fault = repr(error)
            with self.lock:
                self.counts[action.__name__.strip("_")] += 1
                if fault:
                    self.faults.append(f"{action.__name__}: {fault}"[:300])

    def post(self, session: requests.Session, path: str, body: dict[str, Any], **more: Any) -> requests.Response:
        """Ask."""
        return session.post(f"{self.address}{path}", json={"model": self.model, **body}, timeout=600, **more)

    def ask(self, session: requests.Session, dice: random.Random, **more: Any) -> requests.Response:
        """A chat of one question and a short answer."""
        words = " ".join(dice.choices(WORDS, k=dice.randint(1, 20)))
        body = {"messages": [{"role": "user", "content": words}], "max_tokens": dice.randint(1, 48), "temperature": dice.choice((0, 0.9))}
        return self.post(session, "/chat/completions", body | more, stream=bool(more.get("stream")))


def _whole(load: Load, session: requests.Session, dice: random.Random) -> str:
    found = load.ask(session, dice, n=dice.choice((1, 1, 2)), logprobs=dice.random() < 0.3)
    return "" if found.status_code == BUSY or (found.ok and found.json()["choices"][0]["finish_reason"]) else found.text


def _streamed(load: Load, session: requests.Session, dice: random.Random) -> str:
    with load.ask(session, dice, stream=True) as found:
        lines = [line for line in found.iter_lines(decode_unicode=True) if line]
    return "" if found.status_code == BUSY or (found.ok and lines and lines[-1] == "data: [DONE]") else str(lines[-1:])


def _left(load: Load, session: requests.Session, dice: random.Random) -> str:
    """The client goes in mid-answer."""
    with load.ask(session, dice, stream=True, max_tokens=400) as found:
        for count, _ in enumerate(found.iter_lines()):
            if count > dice.randint(0, 6):
                break
    return "" if found.ok or found.status_code == BUSY else str(found.status_code)


def _tools(load: Load, session: requests.Session, dice: random.Random) -> str:
    found = load.ask(session, dice, tools=[TOOL], tool_choice="required", max_tokens=40)
    return "" if found.status_code in (200, 400, BUSY) else found.text  # 400: the model's template has no tools


def _formed(load: Load, session: requests.Session, dice: random.Random) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": FORM, "strict": True}}
    found = load.ask(session, dice, response_format=form, max_tokens=60)
    if found.status_code == BUSY or not found.ok:
        return "" if found.status_code == BUSY else found.text
    choice = found.json()["choices"][0]
    if choice["finish_reason"] == "length":
        return ""
    return "" if "name" in json.loads(choice["message"]["content"]) else found.text


def _completed(load: Load, session: requests.Session, dice: random.Random) -> str:
    found = load.post(session, "/completions", {"prompt": dice.choice(WORDS), "max_tokens": 8})
    return "" if found.ok or found.status_code == BUSY else found.text


def _embedded(load: Load, session: requests.Session, dice: random.Random) -> str:
    found = load.post(session, "/embeddings", {"input": list(WORDS[: dice.randint(1, 3)])})
    return "" if found.ok or found.status_code == BUSY else found.text


def _wrong(load: Load, session: requests.Session, dice: random.Random) -> str:
    """Requests that must be refused, each with its code."""
    body, wanted = dice.choice(WRONG)
    found = session.post(f"{load.address}/chat/completions", json={"model": load.model, **body}, timeout=600)
    return "" if found.status_code in (wanted, BUSY) and "error" in found.json() else f"{found.status_code} {found.text}"


_SAID = [{"role": "user", "content": "Hi"}]
WRONG: list[tuple[dict[str, Any], int]] = [
    ({"messages": []}, 400),
    ({"messages": _SAID, "temperature": 9}, 400),
    ({"messages": _SAID, "model": "another"}, 404),
    ({"messages": _SAID, "no_such_field": 1}, 400),
    ({"messages": [{"role": "user", "content": "word " * 20000}]}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}, 400),
]
ACTIONS: list[Callable[[Load, requests.Session, random.Random], str]] = [
    _whole, _whole, _streamed, _streamed, _left, _left, _tools, _formed, _completed, _embedded, _wrong, _wrong,
]  # fmt: skip


@contextmanager
def served(model: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`finery api` on a free port; its address and process."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "finery", "api", f"model_name_or_path={model}"]
    environment = os.environ | {"API_PORT": str(port), "API_MODEL_NAME": "soaked"}
    with (folder / "server.log").open("w", encoding="utf-8") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(600):
            try:
                if requests.get(f"{address}/models", timeout=5).ok:
                    break
            except requests.RequestException:
                time.sleep(0.5)
            if run.poll() is not None:
                raise SystemExit((folder / "server.log").read_text(encoding="utf-8")[-3000:])
        yield address, psutil.Process(run.pid)
    finally:
        run.terminate()
        run.wait(120)


def soak(minutes: float, clients: int, model: str) -> dict[str, Any]:
    """Load the server for a time; the report."""
    with tempfile.TemporaryDirectory() as name, served(model, Path(name)) as (address, process):
        load, memory = Load(address, "soaked"), []
        threads = [threading.Thread(target=load.client, args=(number,), daemon=True) for number in range(clients)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        while time.monotonic() - began < minutes * 60 and process.is_running():
            time.sleep(EVERY_SECONDS)
            memory.append(process.memory_info().rss)
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        load.ended.set()
        for thread in threads:
            thread.join(600)
        quarter = max(len(memory) // 4, 1)
        before, after = statistics.fmean(memory[quarter : 2 * quarter] or memory), statistics.fmean(memory[-quarter:])
        tokens = _metric(requests.get(address.removesuffix("/v1") + "/metrics", timeout=60).text)
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "clients": clients,
        "requests": sum(load.counts.values()),
        "by_kind": dict(sorted(load.counts.items())),
        "tokens": tokens,
        "faults": len(load.faults),
        "first_faults": load.faults[:5],
        "server_alive": alive,
        "memory_mib": {
            "second_quarter": round(before / 2**20, 1),
            "last_quarter": round(after / 2**20, 1),
            "most": round(max(memory) / 2**20, 1),
        },
        "growth": round(after / before - 1, 4),
    }


def _metric(text: str) -> int:
    """How many tokens were written."""
    found = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("finery_") and "completion" in line.split(" ")[0]]
    return int(sum(map(float, found)))


def failed(report: dict[str, Any]) -> bool:
    """Whether a load has shown a fault."""
    return bool(report["faults"]) or not report["server_alive"] or report["growth"] > GROWTH


def main() -> int:
    """Load, and tell."""
    from finery.models.demo_model import demo_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    about = {
        "command": f"python tests/load.py --minutes {args.minutes:g} --clients {args.clients}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("finery", "torch", "transformers")},
    }
    report = {**about, **soak(args.minutes, args.clients, str(demo_model()))}
    print(json.dumps(report, indent=1))
    if args.result:
        args.result.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(failed(report))


if __name__ == "__main__":
    sys.exit(main())
