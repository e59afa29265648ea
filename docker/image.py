"""Build the images of this folder without a Docker engine, run Finery inside them, and write down what was seen: `make image`.

Debian's debootstrap makes the base and buildah runs every line of the Dockerfiles over it, as root. What differs from machine to machine
comes by variables: FINERY_IMAGE_WORK (where to build; 10 GB), FINERY_IMAGE_DRIVER (buildah's storage: overlay, or vfs), FINERY_IMAGE_MIRROR
(Debian's), FINERY_IMAGE_WHEELS (a folder with a torch of your own, taken instead of the one of TORCH_INDEX), PIP_INDEX and PIP_CERT.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from served import MOVED, SERVERS, serve

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "container" / "result.json"
KINDS = ("cpu", "cuda")
BASE = "localhost/finery-base"
MB = 1e6


@dataclass(frozen=True)
class Desk:
    """Where images are built, and what this machine wants for it."""

    work: Path
    driver: str

    def buildah(self, *words: str) -> list[str]:
        """A command line of buildah on the desk's own storage."""
        storage = ["--root", str(self.work / "storage"), "--runroot", str(self.work / "run"), "--storage-driver", self.driver]
        return ["buildah", *storage, *words]

    def mounts(self) -> list[str]:
        """Folders that stand in for what the network would bring: wheels and certificates, read-only."""
        found = [
            ("wheels", os.environ.get("FINERY_IMAGE_WHEELS")),
            ("certificates", os.environ.get("PIP_CERT") and self.work / "certificates"),
        ]
        return [word for name, folder in found if folder for word in ("-v", f"{folder}:/mnt/{name}:ro")]

    def pip_config(self) -> Path:
        """The pip.conf of this machine as the inside of an image sees it; no image keeps it."""
        lines = ["[global]", "disable-pip-version-check = true"]
        if certificate := os.environ.get("PIP_CERT"):
            folder = self.work / "certificates"
            folder.mkdir(exist_ok=True)
            shutil.copy(certificate, folder / "all.crt")
            lines.append("cert = /mnt/certificates/all.crt")
        if os.environ.get("FINERY_IMAGE_WHEELS"):
            lines.append("find-links = /mnt/wheels")
        path = self.work / "pip.conf"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        path.chmod(0o644)  # read by the image's user
        return path

    def inside(self, container: str, *words: str, user: str = "", alone: bool = False) -> list[str]:
        """A command line that runs in a container, by the image's user unless one is named, with this machine's pip.conf unless `alone`."""
        mounts = [] if alone else [*self.mounts(), "-v", f"{self.pip_config()}:/etc/pip.conf:ro"]
        who = ["--user", user] if user else []
        return self.buildah("run", "--isolation", "chroot", *who, *mounts, container, "--", *words)


def main() -> int:
    """Build both images, run what is to be run, print and keep what was seen."""
    parser = argparse.ArgumentParser("docker/image.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT, help="the file to write (default: docs/container/result.json)")
    parser.add_argument("--only", choices=KINDS, help="one of the two images; the figures of the other stay in the file")
    parser.add_argument("--keep", action="store_true", help="leave the images in FINERY_IMAGE_WORK")
    args = parser.parse_args()
    missing = [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]
    if missing or os.geteuid():
        wanted = [*(["to be run as root"] if os.geteuid() else []), *(f"{tool} (apt-get install {tool})" for tool in missing)]
        print(f"error: this wants {', '.join(wanted)}", file=sys.stderr)
        return 2
    desk = Desk(Path(os.environ.get("FINERY_IMAGE_WORK") or "/tmp/finery-image"), os.environ.get("FINERY_IMAGE_DRIVER") or "overlay")
    desk.work.mkdir(parents=True, exist_ok=True)
    found = origin()
    if args.only and args.result.exists():  # the other image's figures stay
        found = json.loads(args.result.read_text(encoding="utf-8")) | found
    args.result.parent.mkdir(parents=True, exist_ok=True)
    kinds = [args.only] if args.only else KINDS
    try:
        make_base(desk)
        for kind in kinds:
            found[kind] = one_image(desk, kind)
            args.result.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print("\n".join(["", kind, *table(found[kind]), ""]), flush=True)
    finally:
        if not args.keep:
            clean(desk)
    return 0 if all(run["state"] != "failed" for kind in kinds for run in found[kind]["runs"]) else 1


def said_by(command: list[str]) -> str:
    """What a command prints; raises where it fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_base(desk: Desk) -> None:
    """The plainest Debian there is, as an image: it has no Python."""
    rootfs = desk.work / "rootfs"
    if not (rootfs / "etc" / "debian_version").exists():
        print("image: debootstrap makes the base", flush=True)
        shutil.rmtree(rootfs, ignore_errors=True)
        mirror = os.environ.get("FINERY_IMAGE_MIRROR") or "http://deb.debian.org/debian"
        said_by(["debootstrap", "--variant=minbase", "bookworm", str(rootfs), mirror])
        for package in (rootfs / "var/cache/apt/archives").glob("*.deb"):
            package.unlink()
    container = said_by(desk.buildah("from", "scratch"))
    said_by(desk.buildah("add", "--quiet", container, str(rootfs), "/"))
    said_by(desk.buildah("commit", "--quiet", "--rm", container, BASE))


def clean(desk: Desk) -> None:
    """Containers and images go, the base's folder stays for the next time."""
    subprocess.run(desk.buildah("rm", "--all"), check=False, capture_output=True)
    subprocess.run(desk.buildah("rmi", "--all", "--force"), check=False, capture_output=True)


def origin() -> dict[str, Any]:
    """How the result came about."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    tools = {"buildah": said_by(["buildah", "--version"]).split()[2], "debootstrap": said_by(["debootstrap", "--version"]).split()[-1]}
    return {
        "command": "make image",
        "processor": f"{processor}, {os.cpu_count()} cores",
        "base": "Debian bookworm by debootstrap --variant=minbase, without Python",
        "tools": tools,
    }


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, its lines joined, and the comment right above it."""

    word: str
    rest: str
    comment: str

    @property
    def label(self) -> str:
        """What its layer is called."""
        return re.split("[;:]", self.comment)[0] or f"{self.word} {self.rest}"


def read_dockerfile(path: Path) -> Iterator[Instruction]:
    """The instructions of a Dockerfile in their order."""
    comment, whole = "", ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not whole and line.startswith("#"):
            comment = line.lstrip("# ")
            continue
        whole += line.removesuffix("\\").strip() + " "
        if line.endswith("\\"):
            continue
        if whole.strip():
            word, _, rest = whole.strip().partition(" ")
            yield Instruction(word, rest, comment)
        comment, whole = "", ""


def arguments(kind: str) -> dict[str, str]:
    """The build arguments of a file and their defaults."""
    found = (each.rest.partition("=") for each in read_dockerfile(ROOT / "docker" / kind / "Dockerfile") if each.word == "ARG")
    return {name: value.strip('"') for name, _, value in found}


def build_arguments(kind: str) -> dict[str, str]:
    """What is given to the build here; all else keeps the file's default."""
    given = {"BASE_IMAGE": BASE}
    if os.environ.get("FINERY_IMAGE_WHEELS"):
        given["TORCH_INDEX"] = ""
    elif kind == "cuda":
        given["TORCH_INDEX"] = arguments("cpu")["TORCH_INDEX"]  # nothing here has a use for CUDA's libraries
    if index := os.environ.get("PIP_INDEX"):
        given["PIP_INDEX"] = index
    return given


def one_image(desk: Desk, kind: str) -> dict[str, Any]:
    """Build one of the two and run Finery in it."""
    name, file = f"localhost/finery-{kind}", ROOT / "docker" / kind / "Dockerfile"
    given = build_arguments(kind)
    words = [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
    secret = f"id=pip.conf,src={desk.pip_config()}"
    print(f"image: buildah builds {file.relative_to(ROOT)}", flush=True)
    began = time.monotonic()
    command = desk.buildah(
        "bud", "--layers", "--isolation", "chroot", "--secret", secret, *desk.mounts(), *words, "-f", str(file), "-t", name
    )
    with (desk.work / f"{kind}.log").open("w", encoding="utf-8") as log:
        done = subprocess.run([*command, str(ROOT)], stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit("\n".join(Path(log.name).read_text(encoding="utf-8").splitlines()[-40:]))
    seconds = round(time.monotonic() - began)
    layers = read_layers(desk, name, [each for each in read_dockerfile(file) if each.word in ("RUN", "COPY")])
    container = said_by(desk.buildah("from", "--pull-never", name))
    left = left_behind(desk, container)  # before anything runs: a run mounts pip.conf, and its place stays in the container
    runs = list(run_all(desk, container, kind))
    return {
        "file": str(file.relative_to(ROOT)),
        "date": time.strftime("%Y-%m-%d"),
        "extras": arguments(kind)["EXTRAS"],
        "build_seconds": seconds,
        "size_mb": round(sum(layer["size_mb"] for layer in layers), 1),
        "compressed_mb": round(sum(layer["compressed_mb"] for layer in layers), 1),
        "layers": layers,
        "inside": look_inside(desk, name, container),
        "files_of_the_building_machine": left,
        "runs": runs,
    }


def image_of(desk: Desk, name: str) -> dict[str, Any]:
    """What an image says of itself."""
    return json.loads(said_by(desk.buildah("inspect", "--type", "image", name)))["OCIv1"]


def read_layers(desk: Desk, name: str, instructions: list[Instruction]) -> list[dict[str, Any]]:
    """The layers of an image with their sizes, as they lie on a disk and as they are sent."""
    kept = json.loads((desk.work / "storage" / f"{desk.driver}-layers" / "layers.json").read_text(encoding="utf-8"))
    sizes = {layer["diff-digest"]: layer["diff-size"] for layer in kept if "diff-digest" in layer}  # a container's own has none yet
    folder = desk.work / "sent"
    shutil.rmtree(folder, ignore_errors=True)
    said_by(desk.buildah("push", "--quiet", "--compression-format", "gzip", name, f"oci:{folder}:it"))
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    blobs = folder / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].partition(":")[2]).read_text(encoding="utf-8"))
    sent = [layer["size"] for layer in manifest["layers"]]
    shutil.rmtree(folder)
    labels = ["the base", *(each.label for each in instructions)]
    digests = image_of(desk, name)["rootfs"]["diff_ids"]
    return [
        {"made_by": label, "size_mb": round(sizes[digest] / MB, 1), "compressed_mb": round(size / MB, 1)}
        for label, digest, size in zip(labels, digests, sent, strict=True)
    ]


def left_behind(desk: Desk, container: str) -> list[str]:
    """Files that this machine lent to the build and the image has kept: there should be none."""
    script = "find /etc/pip.conf /run/secrets /mnt -type f 2>/dev/null; true"
    return said_by(desk.inside(container, "sh", "-c", script, user="0", alone=True)).splitlines()


def look_inside(desk: Desk, name: str, container: str) -> dict[str, Any]:
    """Who runs there, what is installed, and what is set."""
    config = image_of(desk, name)["config"]
    facts = dict(line[2:].split(": ", 1) for line in said_by(desk.inside(container, "finery", "env")).splitlines() if line.startswith("- "))
    packages = json.loads(said_by(desk.inside(container, "python", "-m", "pip", "list", "--format", "json")))
    kernels = said_by(desk.inside(container, "find", "/cache/finery", "-name", "*.so")).splitlines()
    return {
        "user": int(said_by(desk.inside(container, "id", "-u"))),
        "versions": {name: facts[name] for name in ("finery", "Python", "torch", "transformers", "peft") if name in facts},
        "packages": len(packages),
        "kernels_built_by_the_images_compiler": len(kernels),
        "ports": sorted(port.partition("/")[0] for port in config["ExposedPorts"]),
        "environment": dict(line.split("=", 1) for line in config["Env"]),
    }


def run_all(desk: Desk, container: str, kind: str) -> Iterator[dict[str, Any]]:
    """The main job and the servers on CPUs; the CUDA image shows that it starts."""
    if kind == "cuda":
        yield run_once(desk, container, ["finery", "version"])
        return
    yield run_once(desk, container, ["finery", "demo"])
    for server in SERVERS:
        yield serve(desk, container, server, server.port, {})
        yield serve(desk, container, server, server.port + MOVED, {server.variable: str(server.port + MOVED)})


def run_once(desk: Desk, container: str, words: list[str]) -> dict[str, Any]:
    """Run a command to its end; its last line is kept."""
    print(f"image: {' '.join(words)}", flush=True)
    began = time.monotonic()
    done = subprocess.run(desk.inside(container, *words), capture_output=True, text=True, check=False)
    lines = (done.stdout if not done.returncode else done.stderr or done.stdout).strip().splitlines()
    state = "failed" if done.returncode else "done"
    return {"words": " ".join(words), "state": state, "seconds": round(time.monotonic() - began, 1), "said": lines[-1] if lines else ""}


def table(found: dict[str, Any]) -> list[str]:
    """Layers and runs as they stand in docs/container.md."""
    lines = ["| layer | MB | compressed, MB |", "|---|---|---|"]
    lines += [f"| {layer['made_by']} | {layer['size_mb']:,} | {layer['compressed_mb']:,} |" for layer in found["layers"]]
    lines += [f"| together | {found['size_mb']:,} | {found['compressed_mb']:,} |", "", "| run inside | |", "|---|---|"]
    return [*lines, *(f"| `{run['words']}` | {outcome(run)} |" for run in found["runs"])]


def outcome(run: dict[str, Any]) -> str:
    """What became of a run, in one cell."""
    if run["state"] == "answered":
        return f"answered on port {run['port']}, {run['path']}, status {run['status']}, after {run['seconds']} s: {run['said']}"
    return f"{run['state']} in {run['seconds']} s: {run['said']}"


if __name__ == "__main__":
    raise SystemExit(main())
