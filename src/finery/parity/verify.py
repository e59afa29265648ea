"""An export compared with what was trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finery.compat import free_memory
from finery.data.template import Template
from finery.exports.base import Export, Source
from finery.log import get_logger
from finery.models.lineage import FILE
from finery.models.quantized import own_quantization
from finery.models.quantizers.base import Quantizing
from finery.models.shards import Shards
from finery.models.trained import load_answering, load_beside, load_trained
from finery.parity.answers import answers
from finery.parity.probes import Probe, probes
from finery.parity.reopened import reopen
from finery.parity.report import Report, Trained, compare
from finery.training.memory import free_bytes

log = get_logger(__name__)


def verify(source: Source, template: Template, form: Export, folder: Path, quantizing: Quantizing | None, model_options: Any) -> Report:
    """Ask both the same and compare; the trained model is gone from memory before the export is loaded.

    `quantizing` is how the run held the base's weights while it trained.
    """
    asked = probes(template, _num_known(source))
    dtype = _computed_in(source)
    log.info("comparing the export with what was trained (%s, %d prompts)", str(dtype).removeprefix("torch."), len(asked))
    trained = _trained(source, asked, dtype, quantizing, model_options)
    free_memory()
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch:
        found = reopen(form, folder, asked, sorted(source.stop_ids), name, Path(scratch))
    return compare(trained, found, asked, source.tokenizer, form, (source.dtype, name))


def _num_known(source: Source) -> int:
    """How many tokens the base's own tokenizer has."""
    from finery.models.tokenizer import load_tokenizer

    return len(load_tokenizer(source.found.base, source.trust_remote_code)) if source.found.adapters else len(source.tokenizer)


def _computed_in(source: Source) -> torch.dtype:
    """fp32, which hides nothing, where the memory holds the model so; else the export's own format."""
    base = source.found.base
    if not Shards.there(base):
        return torch.float32
    num_weights = sum(path.stat().st_size for path in Shards(base).paths) / 2  # files of bf16, mostly
    return torch.float32 if 5 * num_weights < free_bytes(torch.device("cpu")) else source.dtype


@torch.no_grad()
def _trained(source: Source, asked: Sequence[Probe], dtype: torch.dtype, quantizing: Quantizing | None, model_options: Any) -> Trained:
    """One model after the other: beside its adapter, without it, merged and rounded, and on few bits where it was trained so."""
    found, stop_ids = source.found, sorted(source.stop_ids)
    given = (found, source.adapter, source.tokenizer, source.trust_remote_code)
    model = load_beside(*given, dtype)
    said = answers(model, asked, stop_ids)
    base = packed = None
    if found.adapters:
        with model.disable_adapter():
            base = answers(model, asked, stop_ids, writes=False)
    del model
    free_memory()
    rounded = answers(load_trained(*given, source.dtype, torch.device("cpu")).to(dtype), asked, stop_ids, writes=False)
    if found.adapters and (quantizing or own_quantization(found.base)):
        few = load_answering(found, source.adapter, source.tokenizer, model_options, quantizing, torch.device("cpu"))
        packed = answers(few, asked, stop_ids, writes=False)
    return Trained(said, rounded, base, packed, source.stop_ids, _lineage(source))


def _lineage(source: Source) -> dict[str, Any]:
    """The base and the adapters, as they were named and by their fingerprints."""
    told: dict[str, Any] = {"base": {"name": source.base_name}, "adapters": [str(folder) for folder in source.found.adapters]}
    for folder in source.found.adapters[:1]:
        if (folder / FILE).exists():
            told |= json.loads((folder / FILE).read_text(encoding="utf-8"))
    return told
