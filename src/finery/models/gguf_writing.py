"""GGUF files, written one tensor at a time: the file begins with all shapes, so that the numbers wait beside it until these are known."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from finery.errors import UserError
from finery.log import get_logger
from finery.models.gguf_families import Family, family_of, sizes
from finery.models.gguf_rope import tell_positions
from finery.models.gguf_tokens import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finery.models.merging import Merged

log = get_logger(__name__)

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_CHUNK = 2**24  # numbers that are converted at a time
_LARGEST_F16 = 65504.0
_PHI3 = ("phi-3", "phi3")
"""A file whose name holds one of them is read with tokens that take the spaces after them."""


def write_gguf(file: Path, model: Merged, kind: str, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> None:
    """`kind`: f32, f16, bf16 or q8_0; the tokenizer has the chat template. Raises `UserError` for what the format cannot hold."""
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    config = model.config
    family = family_of(config)
    positions = tell_positions(config, family)
    shape = {**dict(sizes(config, family)), **positions.facts}
    with tempfile.TemporaryFile(dir=file.parent) as beside:
        shelf = _Shelf(beside, kind)
        for name, weight in positions.factors.items():
            shelf.put(name, weight)
        for name, weight in _told(model.tensors(), config, family):
            shelf.put(name, weight)
        num_rows = shelf.laid["token_embd.weight"].shape[0]
        vocabulary = Vocabulary(tokenizer, num_rows, stop_ids)
        writer = GGUFWriter(file, family.arch)
        writer.add_type("model")
        writer.add_name(_name(file, vocabulary, family, kind))
        writer.add_file_type(LlamaFileType[_FILE_TYPES[kind]])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for key, value in {**shape, "vocab_size": num_rows}.items():
            _add(writer, f"{family.arch}.{key}", value)
        for key, value in vocabulary.facts():
            _add(writer, key if "finery" in key else f"tokenizer.{key}", value)
        shelf.empty_into(writer)
    shelf.say_what_was_kept()


def _name(file: Path, vocabulary: Vocabulary, family: Family, kind: str) -> str:
    name = file.stem.removesuffix(f"-{kind}")
    if not vocabulary.strips:
        return name
    if family.arch == "phi3":
        return name if any(word in name.lower() for word in _PHI3) else f"phi-3 {name}"
    log.warning("GGUF has no words for tokens that take the spaces around them (%s)", ", ".join(vocabulary.strips[:5]))
    return name


def _add(writer: Any, key: str, value: Any) -> None:
    """Whole numbers take 32 bits; ids of tokens and lengths are never negative, kinds of tokens are told as signed ones."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    adders[type(value)](key, value)


def _told(tensors: Iterable[tuple[str, Tensor]], config: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Under the file's names, and as the programs that read it compute with them."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(each for each, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}
    for name, weight in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        module = name.split(".")[-2]
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if told is None or (name.endswith(".bias") and module not in family.biases):
            raise UserError(f"'export_format: gguf' has no place for {name} in a model of the family {family.model_type}")
        if family.turned and module in heads:
            weight = in_pairs(weight, heads[module])
        if family.shifted and name.endswith("norm.weight"):
            weight = weight.float() + 1
        yield told, weight


def in_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of queries or keys as pairs that are rotated together; transformers has the first of all pairs, then the second ones."""
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """What `in_pairs` has done, undone."""
    return weight.reshape(num_heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class _Laid:
    """A tensor that waits."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    num_bytes: int


@dataclass
class _Shelf:
    """Where tensors wait, in the numbers that the file will hold."""

    file: IO[bytes]
    kind: str
    laid: dict[str, _Laid] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)  # names of tensors that did not fit, by what they are instead

    def put(self, name: str, weight: Tensor) -> None:
        kind, offset = self._kind(name, weight), self.file.tell()
        rows = max(1, _CHUNK // weight.shape[-1]) if weight.dim() > 1 else len(weight)
        for start in range(0, len(weight), rows):
            self.file.write(_packed(weight[start : start + rows], kind).tobytes())
        self.laid[name] = _Laid(tuple(weight.shape), kind, offset, self.file.tell() - offset)

    def _kind(self, name: str, weight: Tensor) -> str:
        """Norms and biases stay as they are in every kind; so does what the kind cannot hold."""
        if weight.dim() == 1 or name.endswith("norm.weight"):
            return "f32"
        kind = self.kind
        if kind == "q8_0" and weight.shape[-1] % 32:
            kind = "f16"
        if kind == "f16" and weight.abs().max() > _LARGEST_F16:
            kind = "f32"
        if kind != self.kind:
            self.kept.setdefault(kind, []).append(name)
        return kind

    def empty_into(self, writer: Any) -> None:
        from gguf import GGMLQuantizationType

        for name, each in self.laid.items():
            row_bytes = each.num_bytes // (np.prod(each.shape[:-1], dtype=int) if len(each.shape) > 1 else 1)
            raw = GGMLQuantizationType[each.kind.upper()]
            writer.add_tensor_info(name, (*each.shape[:-1], int(row_bytes)), np.dtype(np.uint8), each.num_bytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in self.laid.values():
            self.file.seek(each.offset)
            writer.write_tensor_data(np.frombuffer(self.file.read(each.num_bytes), np.uint8))
        writer.close()

    def say_what_was_kept(self) -> None:
        for kind, names in self.kept.items():
            why = "its rows are not whole blocks of 32 numbers" if kind == "f16" else "it holds numbers beyond 65504"
            log.warning("%s (of %d tensors that %s does not fit) is written as %s: %s", names[0], len(names), self.kind, kind, why)


def _packed(rows: Tensor, kind: str) -> np.ndarray[Any, Any]:
    if kind == "q8_0":
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        return quantize(rows.float().numpy(), GGMLQuantizationType.Q8_0)
    packed = rows.to(DTYPES[kind]).contiguous()
    return packed.view(torch.int16).numpy() if kind == "bf16" else packed.numpy()
