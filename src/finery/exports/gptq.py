"""Weights in 2, 3, 4 or 8 bits by GPTQ, which reads texts of yours to lose the least; transformers loads them with gptqmodel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from finery.compat import need
from finery.data.calibration import Corpus, calibration
from finery.data.messages import as_dicts, as_schemas
from finery.data.sample import BadRecord, Sample
from finery.exports.base import FewBits, Source, write_beside
from finery.models.quantizers.gptq import GPTQ, room_for_workers
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    import torch

__all__ = ["GPTQExport"]

GROUPS = (128, 64, 32)
"""How many weights of a row share a scale: as many as divide the rows of every layer."""


class GPTQExport(FewBits):
    """The merged model, quantised layer after layer so that each answers to the calibration texts as it did (arXiv 2210.17323)."""

    bits = (2, 3, 4, 8)
    package = "gptqmodel"
    far: ClassVar[Mapping[int, float]] = {8: 0.05, 4: 2.5, 3: 7.0, 2: 35.0}
    """Mean KL in nats that is too far, for models of 135 million weights; larger ones lose much less."""

    class Options(OptionGroup):
        export_quantization_dataset: str | None = None
        """Texts to calibrate with: a file (a column `text`, or conversations), a data set in dataset_info.json, or one on a hub."""
        export_quantization_nsamples: int = Field(128, gt=0)
        """Windows of text that are looked at; fewer where the texts do not hold so many."""
        export_quantization_maxlen: int = Field(1024, gt=1)
        """Tokens of a window; documents are drawn by 'seed', joined and cut, whatever their length."""

    options: Options

    def check(self, run: Any) -> Iterator[Finding]:
        """Texts are needed."""
        if not self.options.export_quantization_dataset:
            text = "is needed by 'export_format: gptq': texts like those that the model will read; bnb, torchao and hqq need none"
            yield Finding("export_quantization_dataset", text)

    def write(self, source: Source, folder: Path) -> None:
        """Layers are on a GPU one after the other, where there is one."""

        need("optimum.gptq", "transformers makes and loads GPTQ by it")
        config = source.merged.config.get_text_config()
        length = min(self.options.export_quantization_maxlen, config.max_position_embeddings or self.options.export_quantization_maxlen)
        number = self.options.export_quantization_nsamples
        corpus = Corpus(str(self.options.export_quantization_dataset), **source.corpora)
        found = calibration(corpus, source.tokenizer, lambda sample: conversation(sample, source.tokenizer, source.jinja), number, length)
        quantizer = Making(found, row_widths(source.merged.config, source.trust_remote_code))
        model = self.packed(source, folder, quantizer)
        model.config.quantization_config.dataset = None  # every token of the windows
        model.config.use_cache = True
        model.save_pretrained(str(folder), max_shard_size=source.shard_bytes)
        write_beside(source, folder, for_ollama=False)

    def open(self, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        """As anybody would, on a machine of few cores as well."""
        room_for_workers()
        return super().open(folder, dtype)


class Making(GPTQ):
    """Makes GPTQ of plain weights while they are loaded."""

    bits = (2, 3, 4, 8)

    def __init__(self, windows: Sequence[Sequence[int]], widths: Iterable[int]) -> None:
        """`widths` are those of the rows of linear layers."""
        super().__init__(OptionGroup())
        self.windows = windows
        self.widths = widths

    def arguments(self, bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """transformers hands them to optimum, which calls gptqmodel."""
        room_for_workers()
        from transformers import GPTQConfig

        return {"quantization_config": GPTQConfig(**gptq_arguments(bits, self.windows, self.widths))}


def gptq_arguments(bits: int, windows: Sequence[Sequence[int]], widths: Iterable[int]) -> dict[str, Any]:
    """What `GPTQConfig` is given. Scales are symmetric and columns stay in their order, which most programs read."""
    texts = [{"input_ids": [list(ids)], "attention_mask": [[1] * len(ids)]} for ids in windows]
    fits = (group for group in GROUPS if all(width % group == 0 for width in widths))
    longest = max(map(len, windows))
    return {
        "bits": bits,
        "dataset": texts,
        "group_size": next(fits, -1),
        "sym": True,
        "desc_act": False,
        "batch_size": 1,
        "model_seqlen": longest,
    }


def row_widths(config: Any, trust_remote_code: bool) -> set[int]:
    """Of the linear layers that a config stands for."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {layer.in_features for layer in model.modules() if isinstance(layer, torch.nn.Linear)}


def conversation(sample: Sample, tokenizer: Any, jinja: str | None) -> str:
    """What the model reads of a conversation; raises `BadRecord` where its template refuses it."""
    from jinja2 import TemplateError

    messages = as_dicts([*sample.messages, *([sample.chosen] if sample.chosen else [])], sample.system)
    if jinja is None:
        return "\n\n".join(str(message["content"]) for message in messages)
    try:
        how = {"chat_template": jinja, "tools": as_schemas(sample.tools), "tokenize": False}
        return str(tokenizer.apply_chat_template(messages, **how))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise BadRecord(f"the template refuses it: {error}") from None
