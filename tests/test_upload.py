"""Folders become models on a hub: against fake hubs on this machine, never the internet."""

import hashlib
import importlib.machinery
import json
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import finery.upload as upload_module
from fake_hub import LARGE, FakeHub, forget_settings, serving
from finery.errors import UserError
from finery.hub import Hub
from finery.upload import check_name, check_upload, upload

FILES = {"config.json": b'{"model_type": "tiny"}', "README.md": b"# Tiny", "empty": b"", "model.safetensors": bytes(range(256)) * LARGE,
         "more/second.safetensors": b"2" * LARGE, "more/notes.txt": b"small"}  # fmt: skip
TOKENS: dict[Hub, str | None] = {"hf": "hf_secret", "ms": "ms_secret", "om": "om_secret"}


# huggingface_hub 2.4 sends large files in a way that its HTTP client calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_settings(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub on this machine."""
    fake = FakeHub()
    with serving(fake, monkeypatch):
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, content in FILES.items():
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes(content)
    return tmp_path / "out"


def send(folder: Path, name: str = "org/tiny", private: bool | None = None) -> str:
    return upload(folder, name, tokens=TOKENS, private=private)


def refusal(folder: Path, name: str = "org/tiny", private: bool | None = None) -> str:
    """The one line with which an upload fails; no token stands in it."""
    with pytest.raises(UserError) as caught:
        send(folder, name, private)
    text = str(caught.value)
    assert "\n" not in text
    assert "secret" not in text
    return text


def sent(fake: FakeHub, part: str) -> list[str]:
    return [path for path, _ in fake.asked if part in path]


def test_every_file_arrives(fake: FakeHub, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("finery"), "propagate", True)
    assert send(folder) == f"{fake.url}/org/tiny"
    assert fake.arrived == {"org/tiny": FILES}
    assert len(fake.blobs) == 2
    assert "visibility" not in fake.made["org/tiny"]
    assert {token for path, token in fake.asked if "/api/" in path} == {"Bearer hf_secret"}
    assert f"uploading {folder} to Hugging Face ({fake.host}) as org/tiny" in caplog.text
    assert "secret" not in caplog.text


def test_what_arrived_is_not_sent_again(fake: FakeHub, folder: Path) -> None:
    fake.denied = {"/commit/": (400, "")}
    refusal(folder)
    assert len(sent(fake, "/blobs/")) == 2
    fake.denied = {}
    assert send(folder) == f"{fake.url}/org/tiny"
    assert fake.arrived["org/tiny"] == FILES
    (folder / "config.json").write_bytes(b"new")
    send(folder)
    assert fake.arrived["org/tiny"] == {**FILES, "config.json": b"new"}
    assert len(sent(fake, "/blobs/")) == 2


def test_large_files_go_by_xet(fake: FakeHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of an ordinary installation; Xet's library takes a folder of this machine for its storage."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet_cache"))
    fake.xet = tmp_path / "xet"
    fake.xet.mkdir()
    assert send(folder) == f"{fake.url}/org/tiny"
    large = {path: content for path, content in FILES.items() if len(content) >= LARGE}
    arrived = fake.arrived["org/tiny"]
    assert arrived == FILES | {path: hashlib.sha256(content).hexdigest().encode() for path, content in large.items()}
    assert any(path.is_file() for path in fake.xet.rglob("*"))
    assert not sent(fake, "/blobs/")

    (folder / "config.json").write_bytes(b"new")
    fake.denied = {"/commit/": (403, "")}
    assert "your account may not write there (403)" in refusal(folder)


def test_a_name_alone_is_the_user_s_own(fake: FakeHub, folder: Path) -> None:
    assert send(folder, "tiny") == f"{fake.url}/me/tiny"
    assert fake.arrived == {"me/tiny": FILES}
    assert send(folder, "tiny") == f"{fake.url}/me/tiny"


def test_private_is_kept(fake: FakeHub, folder: Path) -> None:
    send(folder, "org/one", private=True)
    send(folder, "org/two", private=False)
    assert [fake.made[name]["visibility"] for name in ("org/one", "org/two")] == ["private", "public"]
    send(folder, "org/one", private=True)
    assert refusal(folder, "org/two", private=True) == (
        f"the model 'org/two' cannot be uploaded to Hugging Face ({fake.host}): it is there already and public, but is to be private; "
        f"make it private on {fake.host}/org/two, or take another name"
    )


def test_a_token_that_may_write_but_not_make(fake: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send(folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake.url)
    fake.denied = {"/repos/create": (403, "")}
    (folder / "config.json").write_bytes(b"new")
    assert send(folder) == f"{fake.url}/org/tiny"
    assert fake.arrived["org/tiny"]["config.json"] == b"new"


@pytest.mark.parametrize(
    ("status", "words", "told"),
    [
        (401, "", "it asks for a token that is valid (401); set 'hf_hub_token' or run 'hf auth login'"),
        (403, "", "your account may not write there (403); check the name, and whether the token in 'hf_hub_token' may write to"),
        (403, "Private repository storage limit reached", "no more may be stored there: 403 Forbidden: Private repository storage limit "),
        (404, "", "it has no such user or organisation, or your token does not let you see it; check the name, or set 'hf_hub_token'"),
        (413, "", "no more may be stored there: Client error '413 "),
        (429, "", "it has been asked too often (429); wait some minutes"),
        (500, "", "the hub itself has trouble (500); try again later"),
    ],
)  # fmt: skip
def test_refusals_are_told(status: int, words: str, told: str, fake: FakeHub, folder: Path) -> None:
    fake.denied, fake.words = {"/repos/create": (status, ""), "/api/models/org/tiny": (404, "")}, words
    text = refusal(folder)
    assert text.startswith(f"the model 'org/tiny' cannot be uploaded to Hugging Face ({fake.host}): {told.replace('HOST', fake.host)}")
    assert text.endswith(f". {folder} is complete; 'hf upload org/tiny {folder}' sends it later")
    assert not fake.arrived


def test_troubles_on_the_way_are_told(fake: FakeHub, folder: Path) -> None:
    fake.denied = {"/commit/": (409, "")}
    assert "somebody else is changing it, or the name is taken (409); try again" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"3" * LARGE)
    fake.denied, fake.words = {"/blobs/": (403, "")}, "Storage quota exceeded"
    assert "no more may be stored there: 403 Forbidden: Storage quota exceeded. " in refusal(folder)


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_nobody_listening_is_told(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if hub == "ms":
        pytest.importorskip("modelscope")
        monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    for variable in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(variable, f"http://me:secret@{host}")
    assert f"({host}): nothing answers at {host}; check the network and the proxy. {folder} is complete; " in refusal(folder)


def test_what_a_library_says_holds_no_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ValueError("http://me:password@hub.example does not like\nhf_secret")

    monkeypatch.setattr(upload_module, "contact", lambda _: None)
    monkeypatch.setattr(upload_module, "_send_hf", fail)
    assert ": ValueError: http://hub.example does not like ***; try again. " in refusal(folder)


def test_refused_before_the_hub_is_asked(fake: FakeHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing").mkdir()
    assert refusal(tmp_path / "nothing") == f"there is no file to upload in {tmp_path / 'nothing'}"
    assert refusal(folder, "a name").startswith("'export_hub_model_id': 'a name' is not a name that Hugging Face can have: ")
    place = "the model 'org/tiny' cannot be uploaded to"
    with pytest.raises(UserError) as caught:
        check_upload("org/tiny", {})
    assert str(caught.value) == f"{place} Hugging Face ({fake.host}): there is no token; set 'hf_hub_token' or run 'hf auth login'"
    (tmp_path / "token").write_text("hf_kept")
    check_upload("org/tiny", {})
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(switch, "1")
        assert refusal(folder) == f"{place} Hugging Face ({fake.host}): {switch} is set; unset {switch}"
        monkeypatch.delenv(switch)
    monkeypatch.setenv("USE_OPENMIND_HUB", "1")
    assert "the package 'openmind_hub' is not installed (to upload 'org/tiny', as USE_OPENMIND_HUB is set)" in refusal(folder)
    assert not fake.asked


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "it is empty; write it as 'organisation/name'"),
        ("https://huggingface.co/org/tiny/tree/main", "it is an address; write 'org/tiny'"),
        ("https://modelscope.cn/models/org/tiny", "it is an address; write 'org/tiny'"),
        ("./out", "it is a path; write"),
        ("a/b/c", "it is a path; write"),
        ("models/tiny", "no organisation is called 'models'; write"),
        ("org/a--b", "'--', '..' and '.git' at the end are not allowed; write"),
        ("org/tiny ", "at most 96 of A-Z, a-z, 0-9 and '_' stand on either side of the '/', with '-' and '.' between them; write"),
    ],
)
def test_names_that_no_hub_can_have(name: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_name(name, key="hub_model_id")
    assert str(caught.value).startswith(f"'hub_model_id': {name!r} is not a name that Hugging Face can have: {told}")


@pytest.mark.parametrize("word", ["tiny", "Tiny-7b_v0.1", "_x", "x_", "-x", "x-", ".x", "x.", "a.-b", "a--b", "a..b", "x.git", "é",
                                  "x" * 96, "x" * 97, "x\n", "a b"])  # fmt: skip
def test_names_are_judged_as_the_library_judges_them(word: str) -> None:
    for name in (word, f"org/{word}", f"{word}/tiny"):
        try:
            validate_repo_id(name)
            check_name(name)
        except HFValidationError:
            with pytest.raises(UserError):
                check_name(name)


def test_other_hubs_want_an_organisation(monkeypatch: pytest.MonkeyPatch) -> None:
    check_name("tiny")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    check_name("org/a--b")
    with pytest.raises(UserError, match="that ModelScope can have: it lacks the user or organisation; write"):
        check_name("tiny")
    monkeypatch.delenv("USE_MODELSCOPE_HUB")
    monkeypatch.setenv("USE_OPENMIND_HUB", "1")
    check_name("org/tiny")
    with pytest.raises(UserError, match="that openMind can have: 3 to 40 of A-Z, a-z, 0-9, beginning with a letter"):
        check_name("ab/tiny")


def test_modelscope(fake: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("modelscope")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    before = sorted(folder.rglob("*"))
    assert send(folder, private=True) == f"{fake.url}/models/org/tiny"
    assert fake.arrived == {"org/tiny": FILES}
    assert fake.made["org/tiny"]["Visibility"] == 1
    assert sorted(folder.rglob("*")) == before, "nothing is left in the folder"
    assert send(folder, private=True) == f"{fake.url}/models/org/tiny"
    assert len(sent(fake, "/blobs/")) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "secret" not in said.err
    assert {token for path, token in fake.asked if path != "/"} == {"Bearer ms_secret"}

    send(folder, "org/open")
    assert fake.made["org/open"]["Visibility"] == 5
    assert "it is there already and public, but is to be private" in refusal(folder, "org/open", private=True)


def test_modelscope_s_refusals(fake: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("modelscope")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    place = f"the model 'org/tiny' cannot be uploaded to ModelScope ({fake.host})"
    for status, told in ((401, "it asks for a token that is valid (401); set 'ms_hub_token'"), (403, "your account may not write there")):
        fake.denied = {"/api/v1/models": (status, "")}
        assert refusal(folder).startswith(f"{place}: {told}")
    fake.denied = {"/commit/": (403, "")}
    assert refusal(folder).startswith(f"{place}: your account may not write there (403); ")
    with pytest.raises(UserError, match="there is no token; set 'ms_hub_token'"):
        check_upload("org/tiny", {"hf": "hf_secret"})


def test_openmind(fake: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_OPENMIND_HUB", "y")
    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", fake.url)
    asked: dict[str, object] = {}
    library = ModuleType("openmind_hub")
    library.__spec__ = importlib.machinery.ModuleSpec("openmind_hub", None)
    library.create_repo = lambda name, **given: asked.update(create_repo={"name": name, **given})  # type: ignore[attr-defined]
    library.upload_folder = lambda **given: asked.update(upload_folder=given)  # type: ignore[attr-defined]
    library.model_info = lambda name, token: SimpleNamespace(private=name == "org/tiny")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openmind_hub", library)
    assert send(folder, private=True) == f"{fake.url}/models/org/tiny"
    assert json.loads(json.dumps(asked, default=str)) == {
        "create_repo": {"name": "org/tiny", "token": "om_secret", "private": True, "repo_type": "model", "exist_ok": True},
        "upload_folder": {
            "repo_id": "org/tiny", "folder_path": str(folder), "commit_message": "Upload by Finery", "token": "om_secret",
        },
    }  # fmt: skip
    assert "it is there already and public" in refusal(folder, "org/open", private=True)
    with pytest.raises(UserError, match="there is no token; set 'om_hub_token'"):
        check_upload("org/tiny", {})
