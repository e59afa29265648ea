"""What transformers loses of a GGUF file: the shape of the model, positions, stop tokens, and how text becomes tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.errors import UserError
from finery.models.gguf_families import Family, config_fields, read_family
from finery.models.gguf_rope import FREQUENCIES, LONG, SHORT, read_positions
from finery.models.gguf_tokens import SPACE, STOPS, splittings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LONG_LISTS = ("tokens", "scores", "token_type", "merges")


@dataclass(frozen=True)
class Contents:
    """A file's facts, and its tensors by name; raises `UserError` for what is no such file."""

    file: Path

    @cached_property
    def _reader(self) -> Any:
        from gguf import GGUFReader

        try:
            return GGUFReader(str(self.file))
        except (ValueError, OSError, IndexError) as error:
            raise UserError(f"{self.file} is no GGUF file: {error}") from None

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """All but the tokens and what is said of each."""
        fields = self._reader.fields.items()
        return {key: field.contents() for key, field in fields if not key.endswith(tuple(f"ggml.{name}" for name in _LONG_LISTS))}

    @cached_property
    def arch(self) -> str:
        """The name of the architecture."""
        return str(self.facts.get("general.architecture", ""))

    @cached_property
    def shape(self) -> Mapping[str, Any]:
        """After the name of the architecture."""
        begin = f"{self.arch}."
        return {key.removeprefix(begin): value for key, value in self.facts.items() if key.startswith(begin)}

    @cached_property
    def family(self) -> Family | None:
        """Nothing for one that we do not write."""
        return None if "expert_count" in self.shape else read_family(self.shape, self.arch)

    @cached_property
    def names(self) -> Mapping[str, Any]:
        """The tensors as the file holds them, by name."""
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def tensor(self, name: str) -> Tensor:
        """In fp32."""
        import numpy as np
        import torch
        from gguf import dequantize

        held = self.names[name]
        return torch.from_numpy(np.array(dequantize(held.data, held.tensor_type), dtype=np.float32))

    @property
    def dtype(self) -> torch.dtype:
        """In which its numbers are kept: those of few bits become bf16."""
        import torch

        return {0: torch.float32, 1: torch.float16}.get(int(self.facts.get("general.file_type", -1)), torch.bfloat16)

    @property
    def stop_ids(self) -> list[int]:
        """Every token that ends an answer."""
        named = [self.facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        return sorted({int(place) for place in (*named, *self.facts.get(STOPS, ())) if place is not None})


def read_config(contents: Contents, family: Family) -> Any:
    """The config of a model of a family that we know."""
    from transformers import AutoConfig

    fields, names = config_fields(contents.shape, family), contents.names
    factors = {name: contents.tensor(name) for name in (FREQUENCIES, LONG, SHORT) if name in names}
    fields["rope_parameters"] = read_positions(contents.shape, factors, fields, family)
    fields["tie_word_embeddings"] = "output.weight" not in names
    fields["vocab_size"] = int(names["token_embd.weight"].shape[-1])  # the file counts from the last dimension on
    for name, field in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        fields[f"{field}_token_id"] = contents.facts.get(f"tokenizer.ggml.{name}_token_id")
    if "o_proj" in family.biases:
        fields["attention_bias"], fields["mlp_bias"] = "blk.0.attn_output.bias" in names, "blk.0.ffn_up.bias" in names
    if family.arch == "phi3":
        fields["original_max_position_embeddings"] = contents.shape.get(
            "rope.scaling.original_context_length", fields["max_position_embeddings"]
        )
    return AutoConfig.for_model(family.model_type, **fields)


def read_weights(contents: Contents, model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """By transformers' names, for a family that its reader does not know."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    from finery.models.gguf_writing import from_pairs

    arch = next(each for each, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    known, config = get_tensor_name_map(arch, model.config.num_hidden_layers), model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name in model.state_dict():
        told = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if told is None or told not in contents.names:
            continue
        weight, module = contents.tensor(told), name.split(".")[-2]
        if family.turned and module in heads:
            weight = from_pairs(weight, heads[module])
        yield name, weight - 1 if family.shifted and name.endswith("norm.weight") else weight


def mend_tokens(tokenizer: Any, contents: Contents) -> None:
    """How text is split before tokens are sought: the conversion keeps the vocabulary, and splits all families alike."""
    facts, backend = contents.facts, tokenizer.backend_tokenizer
    if facts.get("tokenizer.ggml.model") == "llama":
        _mend_sentencepiece(backend, bool(facts.get("tokenizer.ggml.add_space_prefix", True)))
        if contents.arch == "phi3" and any(word in str(facts.get("general.name", "")).lower() for word in ("phi-3", "phi3")):
            _mend_phi3(tokenizer)
    elif known := splittings().get(str(facts.get("tokenizer.ggml.pre", ""))):
        _mend_byte_level(backend, known)


def _mend_byte_level(backend: Any, known: Mapping[str, Any]) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    build = {
        "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
        "Digits": lambda alone: pre_tokenizers.Digits(individual_digits=alone),
        "ByteLevel": lambda splits: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits),
    }
    backend.pre_tokenizer = pre_tokenizers.Sequence([build[name](value) for step in known["steps"] for name, value in step.items()])
    backend.model.ignore_merges = known.get("whole_words", False)
    if known.get("composed"):
        backend.normalizer = normalizers.NFC()


def _mend_sentencepiece(backend: Any, adds_space: bool) -> None:
    """A space before text, and before text after a special token, or none at all."""
    from tokenizers import decoders, normalizers

    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if adds_space else spaces
    backend.pre_tokenizer = None
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if adds_space else parts)


def _mend_phi3(tokenizer: Any) -> None:
    """Its special tokens take the spaces after them, but for three; so does </s>."""
    from tokenizers import AddedToken

    for token in tokenizer.added_tokens_decoder.values():
        takes = token.content == "</s>" or (token.special and token.content not in ("<unk>", "<s>", "<|endoftext|>"))
        if takes != token.rstrip:
            mended = AddedToken(token.content, rstrip=takes, normalized=token.normalized, special=token.special)
            tokenizer.add_tokens([mended], special_tokens=token.special)
