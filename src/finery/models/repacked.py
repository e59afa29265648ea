"""A merged model held in few bits, to be saved so."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from finery.models.load import load_model

if TYPE_CHECKING:
    import torch

    from finery.models.merging import Merged
    from finery.models.quantizers.base import Quantizing

SHARD_BYTES = 2_000_000_000
"""Of files that nobody sees: one of them is held in memory while it is written."""


def repacked(
    merged: Merged, folder: Path, asked: Quantizing, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> Any:
    """The model with its linear layers held as `asked`, on `device`.

    It is written plainly into a folder inside of `folder` for that, which is gone afterwards: quantizers pack weights as they read them.
    """
    with TemporaryDirectory(dir=folder, prefix=".plain-") as plain:
        merged.save(Path(plain), SHARD_BYTES)
        return load_model(Path(plain), dtype, trust_remote_code, asked, device)
