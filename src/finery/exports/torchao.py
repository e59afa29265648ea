"""Weights in 8 or 4 bits as torchao holds them, in plain torch; transformers loads them again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.exports.base import Export, Limits, Source, write_beside
from finery.options import Finding

if TYPE_CHECKING:
    import torch

__all__ = ["TorchAOExport"]

FAR = {8: 0.02, 4: 2.5}
"""Mean KL in nats that is too far. A model of 135 million weights is 0.006 away in 8 bits and 0.8 in 4."""


class TorchAOExport(Export):
    """The merged model with torchao's tensors in its linear layers: weights alone are rounded."""

    bits = (4, 8)
    package = "torchao"

    def check(self, run: Any) -> Iterator[Finding]:
        """4 bits that are as large as 8 are told."""
        if self.shared.export_quantization_bit == 4:
            text = "is 4, which torchao stores in bytes: as large as 8, and less exact; 'export_format: bnb', hqq and gptq pack them"
            yield Finding("export_quantization_bit", text, fatal=False)

    def write(self, source: Source, folder: Path) -> None:
        """Always packed on a CPU: what is packed for a GPU is read by that alone."""
        import torch

        from finery.models.ending import save_stop_tokens
        from finery.models.quantizers.base import Quantizing
        from finery.models.quantizers.torchao import TorchAO
        from finery.models.repacked import repacked

        asked = Quantizing(TorchAO(TorchAO.Options()), self.shared.export_quantization_bit or 0)
        model = repacked(source.merged, folder, asked, source.dtype, torch.device("cpu"), source.trust_remote_code)
        model.save_pretrained(str(folder), max_shard_size=source.shard_bytes)
        save_stop_tokens(source.merged, folder, source.stop_ids)
        write_beside(source, folder, is_whole=False)  # Ollama reads no such weights

    def open(self, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        """In the format that its scales are stored in, whatever `dtype` says: torchao 0.18 multiplies 4 bits in no other."""
        from finery.models.load import own_dtype

        return super().open(folder, own_dtype(folder, trust_remote_code=False))

    def limits(self, dtype: torch.dtype) -> Limits:
        """Of the bits; fewer than 8 move more than a small training does, so that its effect is not looked at."""
        bits = self.shared.export_quantization_bit or 0
        return Limits(FAR[bits], (0.5, 1.5) if bits == 8 else None)
