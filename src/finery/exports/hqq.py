"""Weights in 1 to 8 bits as hqq packs them, without any data; Finery loads them again, transformers 5.23 does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finery.exports.base import FewBits, Source, write_beside

if TYPE_CHECKING:
    import torch

__all__ = ["HQQExport"]


class HQQExport(FewBits):
    """The merged model with hqq's layers, under the names that transformers 4 gave them.

    transformers 5.23 has no way to such models: Finery trains on them, chats with them and exports them by a reader of its own.
    """

    bits = (1, 2, 3, 4, 5, 6, 8)
    package = "hqq"
    far: ClassVar[Mapping[int, float]] = {8: 0.05, 6: 0.15, 5: 0.4, 4: 1.0, 3: 7.5, 2: 35.0, 1: 45.0}
    """Mean KL in nats that is too far. A model of 135 million weights is 0.014, 0.05, 0.11, 0.34 and 2.5 away in 8, 6, 5, 4 and 3 bits,
    and says nothing that makes sense in 2 and 1."""

    def write(self, source: Source, folder: Path) -> None:
        """What hqq's layers hold is of every device: it is packed where the merge is computed."""
        from finery.models.quantizers.hqq import GROUP, HQQ
        from finery.models.shards import tensors_once, write_shards

        model = self.packed(source, folder, HQQ(HQQ.Options()), source.device)
        write_shards(tensors_once(model), folder, source.shard_bytes)
        model.config.save_pretrained(str(folder))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = _as_transformers_4(self.asked_bits, GROUP)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_beside(source, folder, for_ollama=False)

    def open(self, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        """By the reader of Finery."""
        from transformers import AutoTokenizer

        from finery.models.load import load_model

        return load_model(folder, dtype, trust_remote_code=False), AutoTokenizer.from_pretrained(str(folder))


def _as_transformers_4(bits: int, group: int) -> dict[str, Any]:
    """The entry of config.json; each layer tells its own settings besides."""
    from hqq.core.quantize import hqq_base_quant_config

    return {"quant_method": "hqq", "quant_config": hqq_base_quant_config(nbits=bits, group_size=group, axis=1), "skip_modules": ["lm_head"]}
