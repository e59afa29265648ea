"""Result files of the measurements: what was found, and how it came about."""

import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finery.compat import processor_flags

PLACES = ("--result", "--plot", "--data")
"""Options that say where something lies on this machine."""


def save(path: Path | None, found: dict[str, Any]) -> None:
    """Write what was found with its origin, where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(origin() | found, indent=1) + "\n", encoding="utf-8")


def origin() -> dict[str, str]:
    """The command without its places, the machine, versions and the date."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    formats = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in processor_flags().split()]
    script, *words = sys.argv
    kept = [word for before, word in zip(["", *words], words, strict=False) if word not in PLACES and before not in PLACES]
    versions = [f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in ("torch", "transformers"))]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *kept]),
        "processor": f"{name}, {os.cpu_count()} cores, {' '.join(formats) or 'no bf16'}",
        "versions": ", ".join(versions),
        "date": time.strftime("%Y-%m-%d"),
    }
