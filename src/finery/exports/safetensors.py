"""Whole models as safetensors, which every program of this field loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finery.exports.base import Export, Limits, Source, write_beside

if TYPE_CHECKING:
    import torch

__all__ = ["Safetensors"]


class Safetensors(Export):
    """The merged model in a plain format of numbers, with tokenizer, template, stop tokens and an Ollama Modelfile."""

    def write(self, source: Source, folder: Path) -> None:
        """See `Export`."""
        source.merged.save(folder, source.shard_bytes)
        write_beside(source, folder)

    def limits(self, dtype: torch.dtype) -> Limits:
        """A merge is computed in fp32: what is left is the rounding of the format."""
        return Limits.of(dtype)
