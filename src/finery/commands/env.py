"""Print versions and devices, for a bug report."""

import platform
import sys
from argparse import ArgumentParser, Namespace
from importlib.metadata import PackageNotFoundError, version

from finery import __version__

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "tokenizers",
    "huggingface_hub",
    "trl",
    "deepspeed",
    "bitsandbytes",
    "vllm",
)


def add_arguments(parser: ArgumentParser) -> None:
    """None."""


def run(args: Namespace, words: list[str]) -> int:
    """`- key: value` lines; what is not installed is left out."""
    facts = {"finery": __version__, "Platform": platform.platform(), "Python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    facts |= _devices()
    for key, value in facts.items():
        print(f"- {key}: {value}")
    return 0


def _devices() -> dict[str, object]:
    import os

    import torch

    from finery.data.registry import default_folder
    from finery.files import cache_folder
    from finery.models.precision import cpu_computes_bf16

    facts: dict[str, object] = {
        "CPU cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "CPU computes bf16": "yes" if cpu_computes_bf16() else "no",
    }
    if torch.cuda.is_available():
        facts |= {"GPU type": torch.cuda.get_device_name(0), "GPU number": torch.cuda.device_count()}
        facts["GPU memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f} GB"
    return facts | {"Default data folder": default_folder("data").resolve(), "Cache": cache_folder()}
