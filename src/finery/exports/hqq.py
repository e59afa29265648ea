"""Weights in 1 to 8 bits as hqq packs them, without any data; Finery loads them again, transformers 5.23 does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.exports.base import Export, Limits, Source, write_beside

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["HQQExport"]

FAR = {8: 0.05, 6: 0.15, 5: 0.4, 4: 1.0, 3: 7.5, 2: 35.0, 1: 45.0}
"""Mean KL in nats that is too far. A model of 135 million weights is 0.014, 0.05, 0.11, 0.34 and 2.5 away in 8, 6, 5, 4 and 3 bits, and
says nothing that makes sense in 2 and 1."""


class HQQExport(Export):
    """The merged model with hqq's layers, under the names that transformers 4 gave them.

    transformers 5.23 has no way to such models: Finery trains on them, chats with them and exports them by a reader of its own.
    """

    bits = (1, 2, 3, 4, 5, 6, 8)
    package = "hqq"

    def write(self, source: Source, folder: Path) -> None:
        """What hqq's layers hold is of every device: it is packed where the merge is computed."""
        from finery.models.ending import save_stop_tokens
        from finery.models.quantizers.base import Quantizing
        from finery.models.quantizers.hqq import GROUP, HQQ
        from finery.models.repacked import repacked
        from finery.models.shards import write_shards

        bits = self.shared.export_quantization_bit or 0
        asked = Quantizing(HQQ(HQQ.Options()), bits)
        model = repacked(source.merged, folder, asked, source.dtype, source.device, source.trust_remote_code)
        write_shards(_tensors(model), folder, source.shard_bytes)
        model.config.save_pretrained(str(folder))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = _as_transformers_4(bits, GROUP)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_stop_tokens(source.merged, folder, source.stop_ids)
        write_beside(source, folder, is_whole=False)  # Ollama reads no such weights

    def limits(self, dtype: torch.dtype) -> Limits:
        """Of the bits; fewer than 8 move more than a small training does, so that its effect is not looked at."""
        bits = self.shared.export_quantization_bit or 0
        return Limits(FAR[bits], (0.5, 1.5) if bits == 8 else None)

    def open(self, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        """By the reader of Finery."""
        from transformers import AutoTokenizer

        from finery.models.load import load_model

        return load_model(folder, dtype, trust_remote_code=False), AutoTokenizer.from_pretrained(str(folder))


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor once; what hqq's layers hold beside tensors is told as tensors, too."""
    import torch

    told: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if torch.is_tensor(value) and id(value) not in told:
            told.add(id(value))
            yield name, value.detach().cpu()


def _as_transformers_4(bits: int, group: int) -> dict[str, Any]:
    """The entry of config.json; each layer tells its own settings besides."""
    from hqq.core.quantize import hqq_base_quant_config

    return {"quant_method": "hqq", "quant_config": hqq_base_quant_config(nbits=bits, group_size=group, axis=1), "skip_modules": ["lm_head"]}
