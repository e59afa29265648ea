"""Opens every engine on one tiny model: the real library where it is installed, else what imitates its interface."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from conftest import build_model
from engines.fakes_llamacpp import fake_llamacpp
from engines.fakes_sglang import fake_sglang
from engines.fakes_vllm import fake_vllm
from finery.compat import have
from finery.engines.base import Engine, Source
from finery.models.load import load_model
from finery.models.trained import Trained
from finery.run import Run

KINDS = ["huggingface", "openvino", "llamacpp", "vllm", "sglang"]
FAKES = {"llamacpp": ("llama_cpp", fake_llamacpp), "vllm": ("vllm", fake_vllm), "sglang": ("sglang", fake_sglang)}
KEYS: dict[str, dict[str, Any]] = {
    "openvino": {"gguf_type": "f16"},
    "sglang": {"sglang_config": {"enable_deterministic_inference": True}},
}
"""With which an engine computes as nearly like the others as it can."""
ALL = {"form", "likeliest", "logprob", "embed", "penalty"}
CAN: dict[str, set[str]] = {
    "huggingface": ALL,
    "llamacpp": ALL,
    "openvino": {"logprob"},
    "vllm": {"likeliest", "logprob", "penalty"},
    "sglang": {"likeliest", "logprob", "penalty"},
}


def ready(kind: str, patch: pytest.MonkeyPatch) -> None:
    """See that an engine's library is there, or skip."""
    module, fake = FAKES.get(kind, ("", None))
    if fake is not None and not have(module):
        fake(patch)
    if kind == "openvino" and not have("openvino_genai"):
        pytest.skip("needs openvino-genai")


def half_model(folder: Path) -> Path:
    """A tiny model whose weights lose nothing in 16 bits."""
    build_model(folder)
    model = load_model(folder, torch.float32, False)
    model.half().float().save_pretrained(str(folder))
    return folder


def open_engine(
    kind: str,
    folder: Path,
    adapters: Sequence[Path] = (),
    served: Mapping[str, Path] | None = None,
    stop_ids: frozenset[int] = frozenset(),
    **keys: Any,
) -> Engine:
    """As a command does, with stop tokens of our own."""
    run = Run.from_dict({"model_name_or_path": str(folder), "infer_backend": kind} | KEYS.get(kind, {}) | keys)
    found = Trained(folder, list(adapters), bool(adapters), run.model.rope_scaling)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    source = Source(found, run.adapter, run.model, run.quantizing, tokenizer, stop_ids, dict(served or {}), run.engines)
    return run.engine.open(source, run.engine_options)


@contextmanager
def opened(kind: str, folder: Path, **how: Any) -> Iterator[Engine]:
    """For the block."""
    with pytest.MonkeyPatch.context() as patch:
        ready(kind, patch)
        engine = open_engine(kind, folder, **how)
        try:
            yield engine
        finally:
            engine.close()


def lora(base: Path, folder: Path, seed: int, rank: int = 4) -> Path:
    """A random adapter that changes what the model says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    how = LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(load_model(base, torch.float32, False), how)
    model.save_pretrained(str(folder))
    return folder
