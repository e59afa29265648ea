"""What a form of export is: it writes a trained model into a folder, and knows how that is opened again and how near it must be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from finery.options import Finding, OptionGroup, PathText

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from finery.models.merging import Merged
    from finery.models.trained import Trained


Blend = Literal[
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "magnitude_prune",
    "magnitude_prune_svd",
]  # fmt: skip
"""Ways to make one adapter of several; what peft calls its combination types."""


class ExportOptions(OptionGroup):
    export_dir: PathText | None = None
    """Where the merged model goes; <output_dir>-merged where it is not given."""
    export_size: int = Field(5, gt=0)
    """The largest file of weights, in GB."""
    export_device: Literal["cpu", "auto"] = "cpu"
    """Where the merge is computed: on the CPU, or on a GPU where there is one."""
    export_dtype: Literal["auto", "float16", "bfloat16", "float32"] | None = None
    """Number format of exported weights; infer_dtype where it is not given."""
    export_legacy_format: bool = False
    """Ask for pickled .bin files. Refused: safetensors is what every tool reads today."""
    export_quantization_bit: int | None = Field(None, gt=0)
    """Write the weights in so many bits."""
    export_merge_type: Blend | None = None
    """Make one adapter of all given ones, instead of merging one after the other: cat is their weighted sum, the others are peft's."""
    export_adapter_weights: tuple[float, ...] = ()
    """How much each adapter counts in export_merge_type; 1 each where it is not given."""
    export_density: float = Field(0.5, gt=0, le=1)
    """Which share of every adapter's numbers is kept by ties, dare and magnitude_prune."""
    export_hub_model_id: str | None = None
    """Also upload the export to this repository of the hub in use (organisation/name)."""
    export_hub_private: bool | None = None
    """Whether a repository that is created for it is private; not given: as the hub does."""
    export_verify: bool = True
    """Compare what was written with what was trained, and the base with the one of the training; false: neither."""

    def check(self, run: Any) -> Iterator[Finding]:
        """Nothing pickled is written; bits that the form makes, and its package."""
        bits, form, name = self.export_quantization_bit, run.form, run.form.name
        yield from self._check_blend(run)
        if self.export_legacy_format:
            yield Finding("export_legacy_format", "asks for pickled .bin files, which are never written; safetensors will be", fatal=False)
        if bits is not None and bits not in form.bits:
            makes = f"makes {', '.join(map(str, form.bits))}" if form.bits else "writes no few bits"
            yield Finding("export_quantization_bit", f"does not fit 'export_format: {name}', which {makes}, found {bits}")
        if bits is None and form.bits:
            yield Finding("export_quantization_bit", f"is needed by 'export_format: {name}' ({', '.join(map(str, form.bits))})")

    def _check_blend(self, run: Any) -> Iterator[Finding]:
        """As many weights as adapters; what only a blend reads."""
        number, weights = len(run.model.adapter_name_or_path), len(self.export_adapter_weights)
        if self.export_merge_type is None:
            for key in ("export_adapter_weights", "export_density"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield Finding(key, "has no effect without 'export_merge_type'", fatal=False)
            return
        if number < 2:
            yield Finding("export_merge_type", f"makes one adapter of several: name them as 'adapter_name_or_path', found {number}")
        elif weights not in (0, number):
            yield Finding("export_adapter_weights", f"should be one for each of 'adapter_name_or_path' ({number}), found {weights}")


@dataclass(frozen=True)
class Limits:
    """How far an export may be from what was trained, over all places of the probes' texts."""

    mean_kl: float  # from the trained model: Kullback-Leibler divergence of the next token's distribution, in nats
    effect: tuple[float, float] | None = None  # how much of the training's effect must be there: 1 all of it, 2 twice; None: not looked at
    exact: float | None = None  # mean KL from the trained model merged in memory and rounded once; None: the form rounds in its own way

    @classmethod
    def of(cls, dtype: torch.dtype) -> Limits:
        """Those of weights that were rounded once, to `dtype`.

        Half precision may lose much of a small training, whose updates are less than the distance to the next number; `exact` says then
        whether that is all that was lost.
        """
        return cls(1e-6, (0.99, 1.01), 1e-7) if dtype.itemsize == 4 else cls(3e-2, (0.0, 1.2), 2e-5)


@dataclass(frozen=True)
class Source:
    """A trained model, as a form is given it."""

    found: Trained
    adapter: Any  # a `finery.models.adapters.base.Adapter`
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    jinja: str | None  # the chat template that was really used
    base_name: str  # what the run calls the base: a folder, or a name on a hub
    dtype: torch.dtype
    device: torch.device
    num_ctx: int
    shard_bytes: int
    trust_remote_code: bool
    corpora: Mapping[str, Any]  # where data sets lie (`dataset_dir`, `download`) and the `seed`, for forms that calibrate

    @cached_property
    def merged(self) -> Merged:
        """The weights with what was trained in them, one after the other."""
        from finery.models.merging import merged

        return merged(self.found, self.adapter, self.tokenizer, self.trust_remote_code, self.dtype, self.device)


REPORT = "parity.json"
"""What an export says of itself: what was compared, and which files it wrote. A folder of these alone may be replaced by another export."""
_BEFORE = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py", "")
"""Endings of what exports wrote that had no report yet, only a signed Modelfile."""


def sign(folder: Path, told: Mapping[str, Any], files: Iterable[str] | None = None) -> None:
    """Write the report of an export: `told`, and the names of the `files` that are its own; not given: all that there are."""
    import json

    own = sorted({REPORT, *(path.name for path in folder.iterdir())} if files is None else files)
    (folder / REPORT).write_text(json.dumps({**told, "files": own}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def written_files(folder: Path) -> set[str] | None:
    """The names of the files that an export wrote into a folder; nothing where no report tells."""
    import json

    try:
        return set(json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_export(folder: Path) -> bool:
    """Whether an export of ours has filled this folder, and nobody has put anything else into it."""
    from finery.models.ollama import SIGNATURE

    entries = list(folder.iterdir())
    if (files := written_files(folder)) is not None:
        return all(entry.is_file() and entry.name in files for entry in entries)
    path = folder / "Modelfile"
    signed = path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(SIGNATURE)
    return signed and all(entry.is_file() and entry.suffix in _BEFORE for entry in entries)


def write_beside(source: Source, folder: Path, for_ollama: bool = True) -> None:
    """What goes with the weights of a whole model: tokenizer, template, stop tokens, and a Modelfile where Ollama reads them."""
    from finery.models.ending import save_stop_tokens
    from finery.models.ollama import ollama_file
    from finery.models.tokenizer import save_tokenizer

    save_tokenizer(source.tokenizer, folder, source.jinja)
    save_stop_tokens(source.merged, folder, source.stop_ids)
    if for_ollama:
        (folder / "Modelfile").write_text(ollama_file(source.tokenizer, source.stop_ids, source.num_ctx), encoding="utf-8")


class Export(ABC):
    """A form in which a model is written."""

    bits: ClassVar[Sequence[int]] = ()  # of `export_quantization_bit`
    package: ClassVar[str] = ""  # which it needs

    Options: ClassVar[type[OptionGroup]] = OptionGroup  # no keys, unless a subclass has some

    def __init__(self, options: Any, shared: ExportOptions) -> None:
        self.options = options
        self.shared = shared

    @property
    def name(self) -> str:
        """The word that chooses it."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def write(self, source: Source, folder: Path) -> None:
        """Write everything that whoever loads the model needs; raises `UserError` for what cannot be written so."""

    @abstractmethod
    def limits(self, dtype: torch.dtype) -> Limits:
        """How far it may be from what was trained, with weights of `dtype` where the form leaves them plain."""

    def open(self, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        """Model and tokenizer as anybody would load them."""
        from transformers import AutoTokenizer

        from finery.models.composite import auto_class

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        return auto_class(folder).from_pretrained(str(folder), dtype=dtype), tokenizer

    def check(self, run: Any) -> Iterator[Finding]:
        """What does not fit together with other keys. That its package is there is asked where it is used: the same file trains."""
        yield from ()


class FewBits(Export):
    """A form that holds linear layers in the bits that `export_quantization_bit` asks for; Ollama reads none of these."""

    far: ClassVar[Mapping[int, float]] = {}  # mean KL in nats that is too far, by bits

    @property
    def asked_bits(self) -> int:
        """`export_quantization_bit`, which is given wherever such a form is chosen."""
        return self.shared.export_quantization_bit or 0

    def packed(self, source: Source, folder: Path, quantizer: Any, device: torch.device | None = None) -> Any:
        """The merged model as `quantizer` holds it: on a CPU, whose way of storing every machine reads, unless a `device` is given."""
        import torch

        from finery.models.quantizers.base import Quantizing
        from finery.models.repacked import repacked

        asked = Quantizing(quantizer, self.asked_bits)
        return repacked(source.merged, folder, asked, source.dtype, device or torch.device("cpu"), source.trust_remote_code)

    def limits(self, dtype: torch.dtype) -> Limits:
        """Of the bits; fewer than 8 move more than a small training does, so that its effect is not looked at."""
        return Limits(self.far[self.asked_bits], (0.5, 1.5) if self.asked_bits == 8 else None)
