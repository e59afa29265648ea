"""A hub of models and data sets on this machine, for tests."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

MODEL = {"config.json": b'{"model_type": "tiny"}', "tokenizer.json": b"{}", "model.safetensors": b"\x02" + bytes(7) + b"{}",
         "pytorch_model.bin": b"twice", "original/params.json": b"{}", "onnx/model.onnx": b"graph"}  # fmt: skip
KEPT = ["config.json", "model.safetensors", "tokenizer.json"]
DATA = {"data.json": b'[{"instruction": "Hi", "output": "Hello"}]'}


def sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@dataclass
class FakeHub:
    """Hugging Face and, below /api/v1, ModelScope; `denied` maps a part of a path to a status and an error code."""

    pages: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    denied: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def add(self, repo: str, revision: str, files: dict[str, bytes]) -> None:
        """Put files at a revision of `models/org/name` or `datasets/org/name`."""
        commit = sha(revision.encode())
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
        tree = [{"type": "file", "path": path, "size": len(body), "oid": sha(body)} for path, body in files.items()]
        blobs = [{"Path": p, "Type": "blob", "Size": len(b), "Sha256": hashlib.sha256(b).hexdigest()} for p, b in files.items()]
        pages = {f"/api/{repo}/revision/{revision}": info, f"/api/{repo}/tree/{commit}": tree}
        pages |= {f"/api/v1/{repo}/repo/{what}?{revision}": {"Data": {"Files": blobs}} for what in ("files", "tree")}
        self.pages |= {path: (json.dumps(page).encode(), commit) for path, page in pages.items()}
        for path, body in files.items():
            self.pages[f"/{repo.removeprefix('models/')}/resolve/{commit}/{path}"] = (body, commit)
            self.pages[f"/api/v1/{repo}/repo?{revision}&{path}"] = (body, commit)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        for part, (status, code) in self.denied.items():
            if part in path:
                return status, {"X-Error-Code": code}, b"{}"
        url, query = urlsplit(path), parse_qs(urlsplit(path).query)
        key = url.path + ("?" + "&".join(query["Revision"] + query.get("FilePath", [])) if "Revision" in query else "")
        if key in self.pages:
            body, commit = self.pages[key]
            return 200, {"ETag": f'"{sha(body)}"', "X-Repo-Commit": commit}, body
        known = any(page.startswith(key.rpartition("/")[0]) for page in self.pages)
        return 404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, b"{}"


@contextmanager
def serving(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve a hub on a free port of this machine, where both clients look for theirs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.asked.append((self.path, self.headers.get("Authorization", "")))
            status, headers, body = fake.answer(self.path)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", fake.url)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield
        server.shutdown()
