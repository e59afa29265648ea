"""Weights in 4 bits (NF4) or 8 (LLM.int8()) as bitsandbytes holds them; transformers loads them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finery.exports.base import Export, Limits, Source, write_beside

if TYPE_CHECKING:
    import torch

__all__ = ["BitsAndBytesExport"]

FAR = {8: 0.2, 4: 3.0}
"""Mean KL in nats that is too far. A model of 135 million weights is 0.06 away in 8 bits, which round inputs as well, and 1.0 in 4."""


class BitsAndBytesExport(Export):
    """The merged model with its linear layers packed, as `quantization_method: bnb` holds them while an adapter is trained."""

    bits = (4, 8)
    package = "bitsandbytes"

    def write(self, source: Source, folder: Path) -> None:
        """Always packed on a CPU, whose way of storing every machine reads.

        Scales are packed, too (double quantisation):
        bitsandbytes 0.50.2 unpacks plain ones wrongly on CPUs with AVX512-bf16, once they have answered.
        """
        import torch

        from finery.models.ending import save_stop_tokens
        from finery.models.quantizers.base import Quantizing
        from finery.models.quantizers.bnb import BitsAndBytes
        from finery.models.repacked import repacked

        quantizer = BitsAndBytes(BitsAndBytes.Options(quantization_type="nf4", double_quantization=True))
        asked = Quantizing(quantizer, self.shared.export_quantization_bit or 0)
        model = repacked(source.merged, folder, asked, source.dtype, torch.device("cpu"), source.trust_remote_code)
        model.save_pretrained(str(folder), max_shard_size=source.shard_bytes)
        save_stop_tokens(source.merged, folder, source.stop_ids)
        write_beside(source, folder, is_whole=False)  # Ollama reads no such weights

    def limits(self, dtype: torch.dtype) -> Limits:
        """Of the bits; fewer than 8 move more than a small training does, so that its effect is not looked at."""
        bits = self.shared.export_quantization_bit or 0
        return Limits(FAR[bits], (0.5, 1.5) if bits == 8 else None)
