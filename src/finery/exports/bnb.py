"""Weights in 4 bits (NF4) or 8 (LLM.int8()) as bitsandbytes holds them; transformers loads them again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from finery.exports.base import FewBits, Source, write_beside

if TYPE_CHECKING:
    pass

__all__ = ["BitsAndBytesExport"]


class BitsAndBytesExport(FewBits):
    """The merged model with its linear layers packed, as `quantization_method: bnb` holds them while an adapter is trained."""

    bits = (4, 8)
    package = "bitsandbytes"
    far: ClassVar[Mapping[int, float]] = {8: 0.2, 4: 3.0}
    """Mean KL in nats that is too far. A model of 135 million weights is 0.06 away in 8 bits, which round inputs as well, and 1.0 in 4."""

    def write(self, source: Source, folder: Path) -> None:
        """Always packed on a CPU, whose way of storing every machine reads.

        Scales are packed, too (double quantisation):
        bitsandbytes 0.50.2 unpacks plain ones wrongly on CPUs with AVX512-bf16, once they have answered.
        """
        from finery.models.quantizers.bnb import BitsAndBytes

        quantizer = BitsAndBytes(BitsAndBytes.Options(quantization_type="nf4", double_quantization=True))
        model = self.packed(source, folder, quantizer)
        model.save_pretrained(str(folder), max_shard_size=source.shard_bytes)
        write_beside(source, folder, for_ollama=False)
