"""manifest.json: what a run has read, on what it ran, and digests of what came out, so that it can be repeated and compared."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finery import __version__
from finery.data.load import Sets
from finery.data.rows.base import Row
from finery.data.sets import SampleSet
from finery.data.sources import Source
from finery.errors import UserError
from finery.files import digest, digest_of_file, replace_text
from finery.models.lineage import fingerprint
from finery.models.trained import Trained
from finery.training.starting import changed

FILE = "manifest.json"
FIRST_STEPS = 100
_PIECE = 1 << 18
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "datasets")
"""Those that a result may depend on."""


class Stream:
    """A digest of the token ids and labels that the first steps were given, in order; of this process's share of each step."""

    def __init__(self) -> None:
        self.digest = ""

    def add(self, step: int, rows: Sequence[Row]) -> None:
        """Take in the rows of a step, counted from 0."""
        if step < FIRST_STEPS:
            self.digest = digest(self.digest, *(array.tobytes() for row in rows for array in (row.ids, row.labels)))


def inputs_of(found: Trained, sets: Sets, token_key: str) -> dict[str, str]:
    """Digests of everything that a run reads, by what a person calls it."""
    told = {"the model's weights": _weights(found.base), "the tokenizer or the template": token_key}
    told |= {f"adapter {number}": _weights(folder) for number, folder in enumerate(found.adapters, 1)}
    for role, units in sets.by_name.items():
        samples = units.samples
        told |= {f"data set {source.name!r}": _data(source) for source in samples.sources}
        told[f"which rows are in the {role} set"] = _rows(samples)
    return told


def _rows(samples: SampleSet) -> str:
    """Which rows of which data sets a set holds, in order."""
    told = digest(*(_data(source) for source in samples.sources))
    for start in range(0, len(samples), _PIECE):
        sources, rows = samples.part.locate(np.arange(start, min(start + _PIECE, len(samples)), dtype=np.int64))
        told = digest(told, np.asarray(sources, np.int64).tobytes(), np.asarray(rows, np.int64).tobytes())
    return told


def _weights(folder: Path) -> str:
    """Of weights that are not safetensors, names and sizes."""
    facts = [f"{path.name} {path.stat().st_size}" for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".gguf", ".pt")]
    config = folder / "config.json"
    return fingerprint(folder) or digest(*facts, *([config] if config.exists() else []))


def _data(source: Source) -> str:
    entry = source.entry
    shape = [entry.columns.model_dump_json(exclude_unset=True), entry.tags.model_dump_json(exclude_unset=True)]
    return digest(*source.contents, entry.formatting, *shape, json.dumps(dict(source.placeholders), sort_keys=True))


def versions() -> dict[str, str]:
    """Of Finery, Python and the packages that a result may depend on."""
    return {"finery": __version__, "python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def machine(device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Where a run was at work."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "processes": num_ranks, "system": platform.system()}


def results(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What came out: losses and digests of the weights' files."""
    losses = {name: value for name, value in metrics.items() if name.endswith("loss") and isinstance(value, float)}
    return {"losses": losses, "weights": {path.name: digest_of_file(path) for path in sorted(folder.glob("*.safetensors"))}}


def write(folder: Path, told: Mapping[str, Any]) -> None:
    """The last file of a run: it stands for a run that has ended well."""
    replace_text(folder / FILE, json.dumps(told, indent=1, ensure_ascii=False, default=str) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """What a finished run has told of itself. Raises `UserError`."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no finished run: there is no {FILE} in it that can be read") from None


class Changed(UserError):
    """What a run reads is not what was expected."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"what is read has changed: {'; '.join(names)}")
        self.names = list(names)


def check_inputs(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise `Changed` where digests of inputs differ from those of a run that is repeated."""
    if names := sorted(changed(expected, found)):
        raise Changed(names)


def planned_steps(folder: Path) -> int | None:
    """For how many steps the run in a folder was, if it has ended well; it may have stopped early."""
    try:
        return read(folder)["planned_steps"]
    except (UserError, KeyError):
        return None
