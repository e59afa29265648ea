"""Weights in 8 or 4 bits as torchao holds them, in plain torch; transformers loads them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finery.exports.base import FewBits, Source, write_beside
from finery.options import Finding

if TYPE_CHECKING:
    import torch

__all__ = ["TorchAOExport"]


class TorchAOExport(FewBits):
    """The merged model with torchao's tensors in its linear layers: weights alone are rounded."""

    bits = (4, 8)
    package = "torchao"
    far: ClassVar[Mapping[int, float]] = {8: 0.02, 4: 2.5}
    """Mean KL in nats that is too far. A model of 135 million weights is 0.006 away in 8 bits and 0.8 in 4."""

    def check(self, run: Any) -> Iterator[Finding]:
        """4 bits that are as large as 8 are told."""
        if self.shared.export_quantization_bit == 4:
            text = "is 4, which torchao stores in bytes: as large as 8, and less exact; 'export_format: bnb', hqq and gptq pack them"
            yield Finding("export_quantization_bit", text, fatal=False)

    def write(self, source: Source, folder: Path) -> None:
        """Always packed on a CPU: what is packed for a GPU is read by that alone."""
        from finery.models.quantizers.torchao import TorchAO

        model = self.packed(source, folder, TorchAO(TorchAO.Options()))
        model.save_pretrained(str(folder), max_shard_size=source.shard_bytes)
        write_beside(source, folder, for_ollama=False)

    def open(self, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        """In the format that its scales are stored in, whatever `dtype` says: torchao 0.18 multiplies 4 bits in no other."""
        from finery.models.load import own_dtype

        return super().open(folder, own_dtype(folder, trust_remote_code=False))
