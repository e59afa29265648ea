"""Weights in safetensors files: read one tensor at a time, and written file by file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards:
    """The weights of a model folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def there(folder: Path) -> bool:
        """Whether a folder has such weights."""
        return (folder / SINGLE).exists() or (folder / INDEX).exists()

    @cached_property
    def paths(self) -> Sequence[Path]:
        """The files; raises `UserError` for an index that cannot be read."""
        index = self.folder / INDEX
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.exists() else [SINGLE]
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{index} cannot be read: {error}") from None
        if lacking := next((name for name in names if not (self.folder / name).exists()), None):
            raise UserError(f"{self.folder} lacks {lacking}, one of the {len(names)} files that hold its weights")
        return [self.folder / name for name in names]

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """Which file holds a weight, in the order of the files; raises `UserError` for one that is not there, or is no such file."""
        from safetensors import SafetensorError, safe_open

        found: dict[str, Path] = {}
        for path in self.paths:
            try:
                with safe_open(path, framework="pt") as file:
                    found |= dict.fromkeys(file.offset_keys(), path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read as safetensors: {error}") from None
        return found

    def tensor(self, name: str) -> Tensor:
        """A copy of a weight: the file is closed again, so that no page of it stays in memory. Raises `KeyError`."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name).clone()


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Write weights as safetensors of at most `shard_bytes` a file, or of a single weight that is larger; one file is held in memory."""
    from safetensors.torch import save_file

    parts: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        save_file({name: weight.contiguous() for name, weight in held.items()}, folder / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append({name: weight.nbytes for name, weight in held.items()})
        held.clear()

    for name, weight in tensors:
        if held and sum(each.nbytes for each in held.values()) + weight.nbytes > shard_bytes:
            flush()
        held[name] = weight
    flush()
    if len(parts) == 1:
        (folder / "part-0").replace(folder / SINGLE)
        return
    names = [f"model-{number + 1:05}-of-{len(parts):05}.safetensors" for number in range(len(parts))]
    for number, name in enumerate(names):
        (folder / f"part-{number}").replace(folder / name)
    weight_map = {weight: name for name, part in zip(names, parts, strict=True) for weight in part}
    total = sum(size for part in parts for size in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def tensors_once(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model in memory, on the CPU; of names that share one, the first."""
    import torch

    told: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if torch.is_tensor(value) and id(value) not in told:
            told.add(id(value))
            yield name, value.detach().cpu()
