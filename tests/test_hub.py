"""Names become folders: against fake hubs on this machine, never the internet."""

import importlib.machinery
import json
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import finery.hub as hub_module
from fake_hub import DATA, KEPT, MODEL, FakeHub, forget_settings, serving
from finery.compat import need
from finery.errors import UserError
from finery.hub import Hub, Kind, active_hub, fetch

Complaint = Callable[..., str]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_settings(monkeypatch, tmp_path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on this machine with one model in two revisions and one data set."""
    fake = FakeHub()
    fake.add("models/org/tiny", "v2", {**MODEL, "config.json": b'{"model_type": "other"}'})
    for revision in ("main", "master"):
        fake.add("models/org/tiny", revision, MODEL)
        fake.add("datasets/org/data", revision, DATA)

    with serving(fake, monkeypatch):
        yield fake


def leave(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make every hub's address a port of this machine at which nobody listens, and return it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    for variable in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "OPENMIND_HUB_ENDPOINT"):
        monkeypatch.setenv(variable, f"http://{host}")
    return host


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged as a warning."""
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("finery.hub"), "warning", told.append)
    return told


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def complaint(tmp_path: Path) -> Complaint:
    """Fetches in vain and returns the one line that it fails with."""

    def fetch_in_vain(name: str, kind: Kind = "model", revision: str = "main", hub: Hub | None = None) -> str:
        with pytest.raises(UserError) as caught:
            fetch(name, kind=kind, revision=revision, hub=hub, cache_dir=str(tmp_path / "cache"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return fetch_in_vain


def test_a_folder_is_itself_and_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]  # an import of it would fail
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert fetch(str(tmp_path), kind="model") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert fetch("org/tiny", kind="dataset") == Path("org/tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("~/org", kind="model") == tmp_path / "org"


def test_a_path_that_leads_nowhere_is_told(complaint: Complaint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert complaint("./modles") == "there is no folder modles; did you mean 'models'?"
    assert complaint("modles/qwen/7b") == f"there is no folder modles/qwen/7b ({tmp_path} has no 'modles'); did you mean 'models'?"
    assert complaint("/no/such/place") == "there is no folder /no/such/place (/ has no 'no')"
    assert complaint("~/no-such-folder").startswith("there is no folder /")
    assert complaint("..\\models") == "there is no folder ..\\models; did you mean 'models'?"
    assert complaint("./notes.txt") == "notes.txt is a file; a folder is needed here"
    assert complaint(" ") == "the name of the model is empty; give a local folder or a hub's 'organisation/name'"


def test_a_model_is_downloaded_without_what_it_holds_twice(fake: FakeHub, tmp_path: Path) -> None:
    folder = fetch("org/tiny", kind="model", cache_dir=str(tmp_path), tokens={"hf": "hf_secret", "ms": "other"})
    assert files_in(folder) == KEPT
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert {token for _, token in fake.asked} == {"Bearer hf_secret"}
    asked = len(fake.asked)
    assert fetch("org/tiny", kind="model", cache_dir=str(tmp_path)) == folder
    assert not [path for path, _ in fake.asked[asked:] if "resolve" in path], "nothing is downloaded twice"


def test_data_sets_and_old_formats_are_downloaded_whole(fake: FakeHub, tmp_path: Path) -> None:
    assert (fetch("org/data", kind="dataset", cache_dir=str(tmp_path)) / "data.json").read_bytes() == DATA["data.json"]
    fake.add("models/org/old", "main", {"config.json": b"{}", "pytorch_model.bin": b"once"})
    assert files_in(fetch("org/old", kind="model", cache_dir=str(tmp_path))) == ["config.json", "pytorch_model.bin"]


def test_the_revision_is_obeyed(fake: FakeHub, complaint: Complaint, tmp_path: Path) -> None:
    folder = fetch("org/tiny", kind="model", revision="v2", cache_dir=str(tmp_path))
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "other"}
    place = f"the model 'org/tiny' cannot be fetched from Hugging Face ({fake.host})"
    assert complaint("org/tiny", revision="v3") == f"{place}: it has no revision 'v3'; check 'model_revision'"


def test_what_is_missing_or_denied_is_told(fake: FakeHub, complaint: Complaint) -> None:
    place = f"cannot be fetched from Hugging Face ({fake.host})"
    login = "set 'hf_hub_token' or run 'hf auth login'"
    missing = f"check the name, {login} if it is private, try USE_MODELSCOPE_HUB=1, or give a local folder"
    for kind in ("model", "dataset"):
        assert complaint("org/none", kind=kind) == (f"the {kind} 'org/none' {place}: it has no such {kind}, or it is private; {missing}")
    fake.denied = {"resolve": (401, "GatedRepo")}
    assert complaint("org/tiny") == (
        f"the model 'org/tiny' {place}: access to it has to be granted first; ask for it on {fake.host}/org/tiny, then {login}"
    )
    fake.denied = {"/api/": (401, "")}
    assert complaint("org/tiny") == f"the model 'org/tiny' {place}: it asks for a token that is valid (401); {login}"
    fake.denied = {"/api/": (403, "")}
    assert complaint("org/data", kind="dataset") == (
        f"the dataset 'org/data' {place}: your account may not read it (403); "
        f"check what the token in 'hf_hub_token' is allowed to on {fake.host}/datasets/org/data"
    )
    fake.denied = {"/api/": (500, "")}
    assert complaint("org/tiny").startswith(f"the model 'org/tiny' {place}: the hub itself has trouble (500)")
    assert complaint("not a name") == (
        f"the model 'not a name' {place}: that is not a name a hub can have; write it as 'organisation/name', or give a local folder"
    )


def test_nobody_listening_is_told_soon(complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = leave(monkeypatch)
    started = time.monotonic()
    assert complaint("org/tiny") == (
        f"the model 'org/tiny' cannot be fetched from Hugging Face ({nobody}): nothing answers at {nobody}, and the cache holds no "
        "complete copy; check the network and the proxy, set HF_ENDPOINT to a mirror, try USE_MODELSCOPE_HUB=1, or give a local folder"
    )
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_a_hub_that_never_speaks_is_told_soon(hub: Hub, complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(hub_module, "need", lambda module, why="": need(module) if module == "requests" else ModuleType(module))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://{host}")
        assert f"({host}): {host} does not answer in time, and the cache holds no complete copy; " in complaint("org/tiny", hub=hub)


def test_first_contact_ends_even_if_the_client_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "PATIENCE_SECONDS", -1.9)
    released = threading.Event()
    with pytest.raises(TimeoutError):
        hub_module.in_time(lambda: released.wait(60))
    released.set()


def test_offline_takes_the_cache_or_says_why_not(
    fake: FakeHub, complaint: Complaint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("org/tiny", kind="model", cache_dir=str(tmp_path / "full"))
    asked = len(fake.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("org/tiny", kind="model", cache_dir=str(tmp_path / "full")) == folder
    for hub, title in (("hf", "Hugging Face"), ("ms", "ModelScope")):
        assert complaint("org/tiny", hub=hub) == (
            f"the model 'org/tiny' cannot be fetched from {title} ({fake.host}): HF_HUB_OFFLINE is set, and the cache holds no "
            "complete copy; unset HF_HUB_OFFLINE, or give a local folder"
        )
    assert len(fake.asked) == asked


def test_the_cache_serves_when_the_hub_does_not(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    folder = fetch("org/tiny", kind="model", cache_dir=str(tmp_path))
    fake.denied = {"/api/": (503, "")}
    assert fetch("org/tiny", kind="model", cache_dir=str(tmp_path)) == folder
    nobody = leave(monkeypatch)
    assert fetch("org/tiny", kind="model", cache_dir=str(tmp_path)) == folder
    taken = "the model 'org/tiny' is taken from the cache, not from Hugging Face"
    assert warnings == [
        f"{taken} ({fake.host}): the hub itself has trouble (503)",
        f"{taken} ({nobody}): nothing answers at {nobody}",
    ]


def test_half_a_download_is_not_the_whole(fake: FakeHub, complaint: Complaint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.denied = {"/model.safetensors": (403, "")}
    assert "your account may not read it (403)" in complaint("org/tiny")
    fake.denied = {}
    nobody = leave(monkeypatch)
    assert f"nothing answers at {nobody}, and the copy in the cache is incomplete (a download was interrupted); " in complaint("org/tiny")
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    assert files_in(fetch("org/tiny", kind="model", cache_dir=str(tmp_path / "cache"))) == KEPT


def test_an_old_copy_must_have_all_its_shards(
    complaint: Complaint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    leave(monkeypatch)
    commit = "a" * 40
    folder = tmp_path / "cache" / "models--org--tiny" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(commit)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    (folder / "model-1.safetensors").touch()
    assert "the copy in the cache is incomplete" in complaint("org/tiny")
    (folder / "model-2.safetensors").touch()
    assert fetch("org/tiny", kind="model", cache_dir=str(tmp_path / "cache")) == folder
    assert len(warnings) == 1


def caused(cause: BaseException) -> Exception:
    error = RuntimeError()
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(28, "No space left on device"),
            ": the disk is full, and the cache holds no complete copy; make room, or set 'cache_dir' to",
        ),
        (
            PermissionError(13, "Permission denied"),
            ": the cache folder cannot be written, and the cache holds no complete copy; set 'cache_dir'",
        ),
        (caused(OSError(101, "Network is unreachable")), ": nothing answers at hub.example, and"),
        (caused(socket.gaierror(-2, "unknown")), ": the network does not know a host hub.example, and"),
        (caused(ssl.SSLError("bad")), ": the certificate of hub.example is not trusted, and"),
        (caused(type("ProxyError", (OSError,), {})()), ": the proxy refuses the connection, and"),
        (ConnectionResetError(), ": the connection to hub.example breaks off, and"),
        (ValueError("a\nb"), ": ValueError: a b, and the cache holds no complete copy; try again, try USE_MODELSCOPE_HUB=1, or give"),
    ],
)
def test_other_failures_become_one_sentence(error: Exception, words: str, complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> Path:
        raise error

    monkeypatch.setattr(hub_module, "_download_hf", fail)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example/")
    text = complaint("org/tiny")
    assert text.startswith(f"the model 'org/tiny' cannot be fetched from Hugging Face (hub.example){words}")
    assert "secret" not in text


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("Y", True), ("0", False), ("no", False), ("", False)])
def test_the_environment_chooses_the_hub(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_OPENMIND_HUB", value)
    assert active_hub() == ("om" if on else "hf")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", value)
    assert active_hub() == ("ms" if on else "hf")


def test_modelscope(fake: FakeHub, complaint: Complaint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    pytest.importorskip("modelscope")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    cache = str(tmp_path / "cache")
    place = "cannot be fetched from ModelScope"

    fake.denied = {"tokenizer.json": (404, "")}
    assert f"the model 'org/tiny' {place} ({fake.host}): it has no such model" in complaint("org/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set, and the cache holds no complete copy; " in complaint("org/tiny")  # though half of it is there
    monkeypatch.delenv("HF_HUB_OFFLINE")

    fake.denied = {}
    folder = fetch("org/tiny", kind="model", cache_dir=cache, tokens={"ms": "ms_secret"})
    assert files_in(folder) == sorted([*KEPT, "pytorch_model.bin"])
    assert "Bearer ms_secret" in {token for _, token in fake.asked}
    assert "Revision=master" in str(fake.asked)
    assert (fetch("org/data", kind="dataset", cache_dir=cache) / "data.json").read_bytes() == DATA["data.json"]

    assert complaint("org/none") == (
        f"the model 'org/none' {place} ({fake.host}): it has no such model (or no revision 'master' of it), or it is private; check "
        "the name, set 'ms_hub_token' if it is private, unset USE_MODELSCOPE_HUB to use Hugging Face, or give a local folder"
    )
    nobody = leave(monkeypatch)
    nothing = f"nothing answers at {nobody}"
    assert fetch("org/tiny", kind="model", cache_dir=cache) == folder
    assert warnings == [f"the model 'org/tiny' is taken from the cache, not from ModelScope ({nobody}): {nothing}"]
    assert f"'org/none' {place} ({nobody}): {nothing}, and the cache holds no complete copy; " in complaint("org/none")

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", fake.url)
    fake.add("models/org/tiny", "master", {**MODEL, "config.json": b"new"})
    fake.denied = {"config.json": (403, "")}
    assert "your account may not read it (403); " in complaint("org/tiny")
    leave(monkeypatch)
    assert "and the cache holds no complete copy; " in complaint("org/tiny"), "half new, half old"


def test_openmind(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_OPENMIND_HUB", "y")
    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", fake.url)
    asked: dict[str, object] = {}

    def snapshot_download(**arguments: object) -> str:
        asked.update(arguments)
        (tmp_path / "snapshot").mkdir()
        return str(tmp_path / "snapshot")

    library = ModuleType("openmind_hub")
    library.__spec__ = importlib.machinery.ModuleSpec("openmind_hub", None)
    library.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openmind_hub", library)
    assert fetch("org/tiny", kind="model", cache_dir=str(tmp_path), tokens={"om": "om_secret"}) == tmp_path / "snapshot"
    assert asked.pop("ignore_patterns") == list(hub_module.FOREIGN)
    assert asked == {"repo_id": "org/tiny", "repo_type": "model", "revision": "main", "cache_dir": str(tmp_path), "token": "om_secret"}


def test_a_missing_library_is_told(complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(module: str, why: str) -> ModuleType:
        raise UserError(f"{module} is missing ({why})")

    monkeypatch.setattr(hub_module, "need", without)
    assert complaint("org/tiny", hub="om") == "openmind_hub is missing (to fetch the model 'org/tiny', as USE_OPENMIND_HUB is set)"
