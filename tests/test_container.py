"""The container files agree with each other, with the package and with their page; the script behind `make image` tells what it sees."""

import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from dataclasses import replace
from fnmatch import translate
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
KINDS = ("cpu", "cuda")
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("container.md", "container_zh.md")}
RESULT: dict[str, Any] = json.loads((ROOT / "docs" / "container" / "result.json").read_text(encoding="utf-8"))
WORDS = {"ARG", "FROM", "RUN", "COPY", "ENV", "EXPOSE", "WORKDIR", "USER", "CMD"}
IGNORED = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script docker/image.py."""
    monkeypatch.syspath_prepend(str(ROOT / "docker"))
    for name in ("FINERY_IMAGE_WHEELS", "PIP_CERT", "PIP_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return import_module("image")


def instructions(image: ModuleType, kind: str, word: str) -> list[str]:
    return [each.rest for each in image.read_dockerfile(ROOT / "docker" / kind / "Dockerfile") if each.word == word]


def environment(image: ModuleType, kind: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in instructions(image, kind, "ENV") for pair in line.split())


def service(kind: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker" / kind / "compose.yaml").read_text(encoding="utf-8"))["services"]["finery"]


def filled(text: str, **variables: str) -> str:
    """What compose makes of `${NAME:-default}`."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1], found[2]), text)


def shut_out(path: str) -> bool:
    """Whether .dockerignore keeps a path, or a folder above it, out of the build."""
    parts = path.split("/")
    above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(matches(pattern, each) for pattern in IGNORED for each in above)


def matches(pattern: str, path: str) -> bool:
    anywhere = pattern.startswith("**/")
    pattern = pattern.removeprefix("**/")
    if "/" not in path:
        return bool(re.match(translate(pattern), path))
    return anywhere and bool(re.match(translate(pattern), path.rsplit("/", 1)[1]))


def test_what_this_test_understands_of_dockerignore() -> None:
    assert all("/" not in pattern.removeprefix("**/") and not pattern.startswith("!") for pattern in IGNORED)
    assert shut_out("src/finery/__pycache__/x.pyc") and shut_out(".git/config") and not shut_out("src/finery/cli.py")


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_can_be_read(image: ModuleType, kind: str) -> None:
    found = list(image.read_dockerfile(ROOT / "docker" / kind / "Dockerfile"))
    assert {each.word for each in found} <= WORDS
    assert [(each.word, each.rest.partition("=")[0]) for each in found[:2]] == [("ARG", "BASE_IMAGE"), ("FROM", "${BASE_IMAGE}")]
    for script in instructions(image, kind, "RUN"):
        shell = re.sub(r"--mount=\S+ ", "", script)
        assert shell.startswith("set -eu;")
        subprocess.run(["sh", "-n", "-c", shell], check=True)
    declared = {each.rest.partition("=")[0] for each in found if each.word == "ARG"}
    used = {name for each in found for name in re.findall(r"\$\{(\w+)", each.rest)}
    assert used - {"other"} <= declared


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_user_and_small_layers(image: ModuleType, kind: str) -> None:
    found = list(image.read_dockerfile(ROOT / "docker" / kind / "Dockerfile"))
    words = [each.word for each in found]
    assert words.index("USER") > max(number for number, word in enumerate(words) if word in ("RUN", "COPY"))
    assert image.arguments(kind)["USER_ID"].isdigit() and image.arguments(kind)["USER_ID"] != "0"
    copies = instructions(image, kind, "COPY")
    assert copies.index(". .") == len(copies) - 1, "the source comes after the packages"
    for script in instructions(image, kind, "RUN"):
        assert "apt-get" not in script or "rm -rf /var/lib/apt/lists/*" in script
        assert "pip install" not in script or "--mount=type=cache,target=/root/.cache/pip" in script


def test_both_files_differ_by_arguments_alone(image: ModuleType) -> None:
    ours = {kind: [(each.word, each.rest) for each in image.read_dockerfile(ROOT / "docker" / kind / "Dockerfile")] for kind in KINDS}
    cpu, cuda = ([(word, rest.partition("=")[0] if word == "ARG" else rest) for word, rest in ours[kind]] for kind in KINDS)
    (more,) = [each for each in cuda if each not in cpu]
    assert more[0] == "ENV" and "NVIDIA_VISIBLE_DEVICES=all" in more[1]
    assert [each for each in cuda if each != more] == cpu
    assert "slim" in image.arguments("cpu")["BASE_IMAGE"] and "cuda" in image.arguments("cuda")["BASE_IMAGE"]
    assert image.arguments("cpu")["TORCH_INDEX"].endswith("/cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_is_there_and_not_shut_out(image: ModuleType, kind: str) -> None:
    for copy in instructions(image, kind, "COPY"):
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists() and (source == "." or not shut_out(source))
    needed = [*(ROOT / "src").rglob("*"), *(ROOT / "examples").rglob("*"), ROOT / "README.md", ROOT / "LICENSE"]
    names = [str(path.relative_to(ROOT)) for path in needed if path.is_file() and "__pycache__" not in path.parts]
    assert [name for name in names if shut_out(name)] == []


def test_data_goes_into_the_image_and_results_do_not() -> None:
    """The guide's user had to edit three files before his data was in the image."""
    for name in ("data/dataset_info.json", "data/mine/chats.jsonl.gz", "data/output/x.json", "data/notes.log", "data/build/x.parquet"):
        assert not shut_out(name), name
    for name in ("saves/x/model.safetensors", "output/x", "model_hub/x/y", "finery-demo/x", ".venv/bin/python", ".git/config", "wandb/x"):
        assert shut_out(name), name


@pytest.mark.parametrize("kind", KINDS)
def test_ports_and_their_variables(image: ModuleType, kind: str) -> None:
    inside, compose = environment(image, kind), service(kind)
    assert {server.variable: str(server.port) for server in image.SERVERS} == {"API_PORT": "8000", "GRADIO_SERVER_PORT": "7860"}
    assert inside["API_HOST"] == inside["GRADIO_SERVER_NAME"] == "0.0.0.0"
    assert sorted(instructions(image, kind, "EXPOSE")[0].split()) == ["7860", "8000"]
    assert sorted(filled(port) for port in compose["ports"]) == ["7860:7860", "8000:8000"]
    for variable, port in (("API_PORT", "8000"), ("GRADIO_SERVER_PORT", "7860")):
        assert inside[variable] == port
        assert "9001:9001" in [filled(line, **{variable: "9001"}) for line in compose["ports"]]
        assert f"{variable}=9001" in [filled(line, **{variable: "9001"}) for line in compose["environment"]]
        for name, page in PAGES.items():
            assert re.search(rf"`{variable}`[^\n]*{port}", page), name


@pytest.mark.parametrize("kind", KINDS)
def test_volumes(image: ModuleType, kind: str) -> None:
    pairs = [filled(line).rsplit(":", 1) for line in service(kind)["volumes"]]
    volumes = {inside: outside for outside, inside in pairs}
    assert volumes == {
        "/cache": "cache",
        "/app/data": "../../data",
        "/app/output": "../../output",
        "/app/saves": "../../saves",
        "/app/model_hub": "../../model_hub",
    }
    made = re.search(r"install -d -o finery -g finery ([^;]*);", instructions(image, kind, "RUN")[0])
    assert made and set(made[1].split()) == {"/app", *volumes} - {"/app/data"}, "the user owns what is mounted; data/ is the clone's own"
    caches = [environment(image, kind)[name] for name in ("HF_HOME", "MODELSCOPE_CACHE", "FINERY_CACHE", "XDG_CACHE_HOME")]
    assert all(folder.startswith("/cache") for folder in caches)
    for name, page in PAGES.items():
        assert [folder for folder in volumes if f"`{folder}`" not in page] == [], name


@pytest.mark.parametrize("kind", KINDS)
def test_compose_builds_this_file_with_its_arguments(image: ModuleType, kind: str) -> None:
    build = service(kind)["build"]
    folder = ROOT / "docker" / kind
    assert (folder / build["context"]).resolve() == ROOT and ROOT / build["dockerfile"] == folder / "Dockerfile"
    assert set(build["args"]) == set(image.arguments(kind)) - {"PYTHON"}
    variables = set(re.findall(r"\$\{(\w+)", (folder / "compose.yaml").read_text(encoding="utf-8")))
    for name, page in PAGES.items():
        assert [word for word in {*variables, *build["args"]} if not re.search(rf"`{word}[`=]", page)] == [], name


def test_the_gpu_is_reserved() -> None:
    (device,) = service("cuda")["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and filled(device["count"]) == "all"
    assert "deploy" not in service("cpu") and filled(service("cuda")["shm_size"]) == "16gb"


@pytest.mark.parametrize("kind", KINDS)
def test_extras_exist(image: ModuleType, kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = image.arguments(kind)["EXTRAS"].split(",")
    assert set(extras) <= set(project["optional-dependencies"]) and {"serve", "web"} <= set(extras)
    for page in PAGES.values():
        assert f"`{','.join(extras)}`" in page
    assert project["requires-python"] == ">=3.11" and "v >= (3, 11)" in instructions(image, kind, "RUN")[0]


def test_make_image_runs_the_script() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^image:.*##", text, re.M) and "docker/image.py" in text
    assert re.search(r"^\.PHONY:.* image\b", text, re.M)
    for name in ("README.md", "README_zh.md"):
        page = "docs/container_zh.md" if "zh" in name else "docs/container.md"
        assert page in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_of_these_files(image: ModuleType, kind: str) -> None:
    found = RESULT[kind]
    made = [each.label for each in image.read_dockerfile(ROOT / "docker" / kind / "Dockerfile") if each.word in ("RUN", "COPY")]
    assert [layer["made_by"] for layer in found["layers"]] == ["the base", *made]
    for size in ("size_mb", "compressed_mb"):
        assert sum(layer[size] for layer in found["layers"]) == pytest.approx(found[size], abs=0.2)
    inside = found["inside"]
    assert str(inside["user"]) == image.arguments(kind)["USER_ID"] and found["files_of_the_building_machine"] == []
    assert inside["ports"] == ["7860", "8000"]
    assert {name: inside["environment"][name] for name in environment(image, kind) if name != "PATH"} == {
        name: value for name, value in environment(image, kind).items() if name != "PATH"
    }
    assert found["extras"] == image.arguments(kind)["EXTRAS"]
    assert all(run["state"] in ("done", "answered") for run in found["runs"])


def test_the_result_names_how_it_came_about_and_no_machine() -> None:
    assert RESULT["command"] == "make image" and RESULT["tools"]["buildah"] and RESULT["cpu"]["inside"]["versions"]
    assert RESULT["cpu"]["runs"][0]["words"] == "finery demo" and RESULT["cpu"]["runs"][0]["state"] == "done"
    text = json.dumps(RESULT)
    assert socket.gethostname() not in re.findall(r"[\w.-]+", text) and str(ROOT) not in text and "/tmp/" not in text


def test_the_pages_say_what_the_result_says(image: ModuleType) -> None:
    for kind in KINDS:
        lines = image.table(RESULT[kind])
        assert [line for line in lines if line and line not in PAGES["container.md"]] == []
        for line in lines:  # the figures stand in the Chinese page too
            if re.search(r"\| [\d,.]+ \|$", line):
                assert line.partition(" | ")[2] in PAGES["container_zh.md"], line
        for run in RESULT[kind]["runs"]:
            assert f"`{run['words']}`" in PAGES["container_zh.md"]
        assert all(RESULT[kind]["date"] in page for page in PAGES.values())


def test_links_in_the_pages_lead_somewhere() -> None:
    for page in PAGES.values():
        for target in re.findall(r"\]\(([^)#\s]+)", page):
            assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target


def test_what_the_build_is_given(image: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert image.build_arguments("cpu") == {"BASE_IMAGE": image.BASE}
    assert image.build_arguments("cuda")["TORCH_INDEX"].endswith("/cpu")
    certificate = tmp_path / "ca.pem"
    certificate.write_text("x")
    monkeypatch.setenv("FINERY_IMAGE_WHEELS", "/some/wheels")
    monkeypatch.setenv("PIP_CERT", str(certificate))
    assert image.build_arguments("cpu")["TORCH_INDEX"] == image.build_arguments("cuda")["TORCH_INDEX"] == ""
    desk = image.Desk(tmp_path, "vfs")
    assert "cert = /mnt/certificates/all.crt\nfind-links = /mnt/wheels" in desk.pip_config().read_text()
    assert "/some/wheels:/mnt/wheels:ro" in desk.mounts() and "/some/wheels:/mnt/wheels:ro" in desk.inside("c", "id")
    assert desk.inside("c", "id", alone=True)[-6:] == ["run", "--isolation", "chroot", "c", "--", "id"]


def test_a_wish_that_cannot_be_met_is_told(image: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["image.py"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert image.main() == 2
    assert "buildah (apt-get install buildah), debootstrap" in capsys.readouterr().err


class Here:
    """A desk whose inside is this machine."""

    def __init__(self, work: Path, *command: str) -> None:
        self.work, self.command = work, command

    def inside(self, container: str, *words: str, **kind: Any) -> list[str]:
        """The command instead of `finery …`, with the variables and the time limit that stand before it."""
        return [*words[: words.index("finery")], *self.command]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SERVER = """
import json, os
from http.server import *

class Asked(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/?token=t0k":
            self.send_response(303)
            self.send_header("Set-Cookie", "known=1")
            self.send_header("Location", "/en/")
        else:
            self.send_response(200 if (self.path, self.headers["Cookie"]) == ("/en/", "known=1") else 401)
        self.end_headers()
        self.wfile.write(b"x" * 2000)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        self.send_response(200 if self.headers["Authorization"] == "Bearer s3cret" else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": asked.upper() + "\\n"}}]}).encode())

server = HTTPServer(("", int(os.environ["PORT"])), Asked)
print(os.environ["TOLD"], flush=True)
server.serve_forever()
"""


def test_a_server_that_refuses_has_failed_at_once(image: ModuleType, tmp_path: Path) -> None:
    port, server = free_port(), replace(image.SERVERS[1], path="/elsewhere")
    code = SERVER.replace("401", "404")
    found = image.serve(Here(tmp_path, sys.executable, "-c", code), "c", server, port, {"PORT": str(port), "TOLD": ""})
    assert (found["state"], found["status"]) == ("failed", 404)


@pytest.mark.parametrize(
    ("number", "told", "path", "said"),
    [(0, "with the key s3cret (made up)", "/v1/chat/completions", "'WHO ARE YOU?'"), (1, "at http://x/?token=t0k", "/en/", "2 kB")],
)
def test_a_server_is_started_asked_and_stopped(image: ModuleType, tmp_path: Path, number: int, told: str, path: str, said: str) -> None:
    """With the key or token that it tells, as its users do."""
    port, server = free_port(), image.SERVERS[number]
    found = image.serve(Here(tmp_path, sys.executable, "-c", SERVER), "c", server, port, {"PORT": str(port), "TOLD": told})
    words = " ".join([f"PORT={port}", f"TOLD={told}", "finery", *server.words])
    assert (found["words"], found["state"], found["path"], found["status"], found["said"]) == (words, "answered", path, 200, said)
    assert not import_module("served").answers(port)
    assert image.outcome(found).startswith(f"answered on port {port}, {path}, status 200") and image.outcome(found).endswith(said)


def test_a_server_that_ends_has_failed_with_its_last_words(image: ModuleType, tmp_path: Path) -> None:
    server = image.SERVERS[1]
    found = image.serve(Here(tmp_path, sys.executable, "-c", "print('no way')"), "c", server, free_port(), {})
    assert (found["state"], found["said"]) == ("failed", "no way")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        found = image.serve(Here(tmp_path), "c", server, other.getsockname()[1], {})
    assert found["state"] == "failed" and "another program" in found["said"]


def test_both_servers_are_asked_on_both_ports(image: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[str] = []

    def serve(desk: Any, container: str, server: Any, port: int, variables: dict[str, str]) -> dict[str, Any]:
        served.append(f"{server.words[0]} {port} {variables}")
        return {"words": server.words[0], "state": "answered"}

    monkeypatch.setattr(image, "serve", serve)
    monkeypatch.setattr(image, "run_once", lambda desk, container, words: {"words": " ".join(words), "state": "done"})
    runs = list(image.run_all(image.Desk(tmp_path, "vfs"), "c", "cpu"))
    assert [run["state"] for run in runs] == ["done", *["answered"] * 4]
    ports = ["api 8000 {}", "api 18000 {'API_PORT': '18000'}", "webui 7860 {}", "webui 17860 {'GRADIO_SERVER_PORT': '17860'}"]
    assert served == ports
