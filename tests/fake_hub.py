"""A hub of models and data sets on this machine, for tests."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

MODEL = {"config.json": b'{"model_type": "tiny"}', "tokenizer.json": b"{}", "model.safetensors": b"\x02" + bytes(7) + b"{}",
         "pytorch_model.bin": b"twice", "original/params.json": b"{}", "onnx/model.onnx": b"graph"}  # fmt: skip
KEPT = ["config.json", "model.safetensors", "tokenizer.json"]
DATA = {"data.json": b'[{"instruction": "Hi", "output": "Hello"}]'}


LARGE = 1000
"""Files from this size on are stored apart (LFS)."""


def sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@dataclass
class FakeHub:
    """Hugging Face and, below /api/v1, ModelScope; `denied` maps a part of a path to a status and an error code."""

    pages: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    denied: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    words: str = ""
    """What the hub says where it denies."""
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What a repository was made with, by its name."""
    arrived: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files that were uploaded, by the name of the repository."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files, by their SHA-256."""
    xet: Path | None = None
    """A folder that stands for Xet's storage; a large file that was sent there is known by its SHA-256 alone."""

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
                return status, {"X-Error-Code": code, "X-Error-Message": self.words}, b"{}"
        url, query = urlsplit(path), parse_qs(urlsplit(path).query)
        key = url.path + ("?" + "&".join(query["Revision"] + query.get("FilePath", [])) if "Revision" in query else "")
        if key in self.pages:
            body, commit = self.pages[key]
            return 200, {"ETag": f'"{sha(body)}"', "X-Repo-Commit": commit}, body
        name = re.sub(r"^/(openapi/v1|api)/models/|/revision/main$", "", url.path)
        if self.xet and "/xet-write-token/" in path:
            return 200, {}, json.dumps({"casUrl": f"local://{self.xet}", "exp": 2**32, "accessToken": "xet"}).encode()
        if name in self.made:
            private = self.made[name].get("visibility") == "private" or self.made[name].get("Visibility") == 1
            info = {"id": name, "sha": sha(b""), "private": private}
            return 200, {}, json.dumps(info | {"data": info}).encode()
        known = any(page.startswith(key.rpartition("/")[0]) for page in self.pages)
        return 404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, b"{}"

    def take(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """What is sent to the hub: a repository to make, and files for it."""
        if any(part in path for part in self.denied):
            return self.answer(path)
        if path.startswith("/blobs/"):
            assert path == f"/blobs/{hashlib.sha256(body).hexdigest()}"
            self.blobs[path.removeprefix("/blobs/")] = body
            return 200, {}, b"{}"
        if path in ("/api/repos/create", "/api/v1/models"):
            return self.make(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {}, b'{"warnings": [], "errors": []}'
        found = re.search(r"([\w.-]+/[\w.-]+?)(\.git)?/(preupload|commit|info)/", path)
        name = found[1] if found else ""
        if name not in self.made:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if "/preupload/" in path:
            page: Any = {"files": [self.mode(name, file) for file in json.loads(body)["files"]]}
        elif path.endswith("/info/lfs/objects/batch"):
            page = {"transfer": "basic", "objects": [self.place(blob) for blob in json.loads(body)["objects"]]}
        else:
            page = self.commit(name, path, body)
        return 200, {}, json.dumps(page | {"Data": page}).encode()

    def make(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """A repository, in the way of Hugging Face or of ModelScope."""
        is_hf = "organization" in asked
        name = f"{asked['organization'] or 'me'}/{asked['name']}" if is_hf else f"{asked['Path']}/{asked['Name']}"
        page = {"url": f"{self.url}/{name}", "Code": 10010101001 if name in self.made else 200, "Message": "", "Data": {}}
        if name in self.made:
            return 409 if is_hf else 400, {}, json.dumps(page).encode()
        self.made[name] = asked
        return 200, {}, json.dumps(page).encode()

    def mode(self, name: str, file: dict[str, Any]) -> dict[str, Any]:
        """How Hugging Face wants a file, and which content it has of it."""
        here = self.arrived.get(name, {}).get(file["path"])
        large = file["size"] >= LARGE
        digest = None if here is None else hashlib.sha256(here) if large else hashlib.sha1(b"blob %d\0" % len(here) + here)
        return file | {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": digest and digest.hexdigest()}

    def place(self, blob: dict[str, Any]) -> dict[str, Any]:
        """Where a large file goes; nowhere, if it is here."""
        return blob if blob["oid"] in self.blobs else blob | {"actions": {"upload": {"href": f"{self.url}/blobs/{blob['oid']}"}}}

    def commit(self, name: str, path: str, body: bytes) -> dict[str, str]:
        """Files for a branch: Hugging Face's lines, or ModelScope's actions."""
        assert path.endswith(f"/{name}/commit/{'master' if '/v1/' in path else 'main'}")
        if "/v1/" in path:
            files = json.loads(body)["actions"]
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] | {"sha256": line["value"].get("oid")} for line in lines if line["key"] in ("file", "lfsFile")]
        if self.xet:
            self.blobs |= {file["sha256"]: file["sha256"].encode() for file in files if file.get("sha256")}
        content = {file["path"]: self.blobs[file["sha256"]] if file.get("sha256") else base64.b64decode(file["content"]) for file in files}
        self.arrived.setdefault(name, {}).update(content)
        return {"commitUrl": f"{self.url}/{name}/commit/{sha(body)}", "commitOid": sha(body)}


def read_body(stream: BufferedIOBase, headers: Message) -> bytes:
    """The body of a request, of a told length or in pieces."""
    if "chunked" not in headers.get("Transfer-Encoding", ""):
        return stream.read(int(headers.get("Content-Length") or 0))
    body = b""
    while size := int(stream.readline(), 16):
        body += stream.read(size)
        stream.readline()
    stream.readline()
    return body


def forget_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The developer's own hubs, tokens and proxies stay out of it."""
    names = "HF_TOKEN HF_HUB_OFFLINE TRANSFORMERS_OFFLINE USE_MODELSCOPE_HUB USE_OPENMIND_HUB MODELSCOPE_DOMAIN MODELSCOPE_ENDPOINT"
    for name in (*names.split(), "OPENMIND_HUB_ENDPOINT", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # huggingface_hub would ask the real hub, whatever the endpoint, for a list of agents.
    monkeypatch.setattr("huggingface_hub.utils._headers.detect_agent", lambda: None)
    for name in ("MODELSCOPE_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    if "modelscope_hub.config" in sys.modules:  # it keeps the first hub that it was used with
        monkeypatch.setattr("modelscope_hub.config._default_config", None)


@contextmanager
def serving(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve a hub on a free port of this machine, where both clients look for theirs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.asked.append((self.path, self.headers.get("Authorization", "")))
            if self.command in ("POST", "PUT"):
                status, headers, body = fake.take(self.path, read_body(self.rfile, self.headers))
            else:
                status, headers, body = fake.answer(self.path)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", fake.url)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield
        server.shutdown()
