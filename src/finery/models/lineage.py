"""What a model was made of: the base's weights by a fingerprint, written beside what was trained, and found again by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finery.errors import UserError
from finery.files import digest
from finery.hub import is_local
from finery.log import get_logger
from finery.models.quantized import own_quantization
from finery.models.shards import Shards

log = get_logger(__name__)

FILE = "lineage.json"
"""The base of a training, in the folder of what was trained."""
SAMPLE = 512
"""Bytes that are looked at in the middle of every weight."""


def fingerprint(folder: Path) -> str | None:
    """A digest of a folder's weights: names, shapes and formats of all, and bytes out of the middle of each; None without safetensors.

    Whatever was trained changes some bytes of every weight that it touches; the whole of a large model would take minutes to read.
    """
    if not Shards.there(folder):
        return None
    return _fingerprint(folder, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in Shards(folder).paths))


@cache
def _fingerprint(folder: Path, facts: Sequence[Any]) -> str:
    parts: list[str | bytes] = []
    for path, *_ in facts:
        header, start = _header(path)
        with path.open("rb") as file:
            for name, weight in sorted(header.items()):
                begin, end = weight["data_offsets"]
                file.seek(start + begin + max(0, (end - begin - SAMPLE) // 2))
                parts += [json.dumps([name, weight["dtype"], weight["shape"]]), file.read(min(SAMPLE, end - begin))]
    return digest(*parts)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its weights, and where their bytes begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def write_lineage(folder: Path, name: str, base: Path) -> None:
    """Tell beside what was trained which weights it was trained on; `name` is what the run called them."""
    told = {"name": name, "folder": str(base.resolve()) if is_local(name) else None, "weights": fingerprint(base)}
    told["quantised"] = own_quantization(base).get("quant_method")
    (folder / FILE).write_text(json.dumps({"base": told}, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Told:
    """What lineage.json says of the base."""

    name: str
    weights: str
    folder: str | None = None
    quantised: str | None = None


def true_base(named: Path, adapters: Sequence[Path]) -> Path:
    """The base that `adapters` were trained on: the `named` one, or another place that they tell, where the weights are the same.

    Raises `UserError` where none is. Adapters that tell nothing are taken at their word; the weights that few bits were made of may be
    given in their place.
    """
    told = _read(adapters)
    if told is None or fingerprint(named) in (None, told.weights):
        return named
    if told.quantised and not own_quantization(named):
        log.warning(
            "%s was trained on weights that came in few bits (%s): %s is taken as their original", adapters[0], told.quantised, named
        )
        return named
    for place in {told.folder, told.name} - {None, str(named)}:
        if (folder := Path(str(place))).is_dir() and fingerprint(folder) == told.weights:
            log.warning("%s is not what %s was trained on; %s is, and is taken", named, adapters[0], folder)
            return folder
    raise UserError(
        f"'model_name_or_path': {adapters[0]} was trained on other weights than those in {named}: on {told.name} (fingerprint "
        f"{told.weights[:12]}); give that model, or 'export_verify: false' to merge into this one in spite of it"
    )


def _read(adapters: Sequence[Path]) -> _Told | None:
    """The lineage of the first adapter, where it has one: those after it were trained on it merged with what is before them."""
    if not adapters:
        return None
    try:
        base = json.loads((adapters[0] / FILE).read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, KeyError):
        return None
    return _Told(base["name"], base["weights"], base.get("folder"), base.get("quantised")) if base.get("weights") else None
