"""Adapters alone, for programs that put them on the base themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.errors import UserError
from finery.exports.base import Export, Limits, Source
from finery.options import Finding

if TYPE_CHECKING:
    import torch

__all__ = ["Adapter"]

FILES = ("adapter_config.json", "adapter_model.safetensors", "lineage.json", "held_in.json", "rope.json")
"""What an adapter's folder holds besides the tokenizer, each where it is there."""


class Adapter(Export):
    """One adapter in peft's format, with the tokenizer and the template that it was trained with."""

    def check(self, run: Any) -> Iterator[Finding]:
        """A whole model has no adapter."""
        if not run.adapter.takes_adapters:
            yield Finding("export_format", f"is 'adapter', but 'finetuning_type' {run.choices.finetuning_type!r} makes a whole model")

    def write(self, source: Source, folder: Path) -> None:
        """Its files, with the base by the name that was used for it."""
        if len(source.found.adapters) != 1:
            found = f"{len(source.found.adapters)} adapters were named" if source.found.adapters else "no adapter was named or found"
            raise UserError(f"'export_format: adapter' writes a single adapter, and {found}: 'export_merge_type' makes one of several")
        from finery.models.tokenizer import save_tokenizer

        (adapter,) = source.found.adapters
        for name in FILES:
            if (adapter / name).exists():
                shutil.copy2(adapter / name, folder / name)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": source.base_name, "inference_mode": True}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_tokenizer(source.tokenizer, folder, source.jinja)

    def limits(self, dtype: torch.dtype) -> Limits:
        """Nothing was computed: both are the same adapter beside the same base."""
        return Limits(1e-6, (0.99, 1.01))

    def open(self, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        """peft's own way, which finds the base by its name."""
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer

        return AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=dtype), AutoTokenizer.from_pretrained(str(folder))
