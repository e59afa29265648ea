"""One GGUF file with everything in it, as llama.cpp, Ollama and many others read it, and a Modelfile for Ollama."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finery.exports.base import Export, Limits, Source
from finery.options import OptionGroup

if TYPE_CHECKING:
    import torch

__all__ = ["Gguf"]


class Gguf(Export):
    """A GGUF file with weights, tokenizer, chat template and stop tokens, for llama.cpp and Ollama, and a Modelfile."""

    class Options(OptionGroup):
        export_gguf_type: Literal["f32", "f16", "bf16", "q8_0", "auto"] = "auto"
        """Numbers of the file: 32 bits, 16 (f16 or bf16), 8 (q8_0), or auto: those of the exported dtype. Norms always have 32 bits."""

    def write(self, source: Source, folder: Path) -> None:
        """See `Export`."""
        from finery.models.gguf_tokens import with_template
        from finery.models.gguf_writing import DTYPES, write_gguf
        from finery.models.ollama import ollama_file

        kind = self._kind(source.dtype)
        if DTYPES.get(kind) != source.dtype and source.found.adapters:
            import torch

            source = replace(source, dtype=torch.float32)  # what was merged is rounded once
        tokenizer = with_template(source.tokenizer, source.jinja)
        file = folder / f"{_name(source)}-{kind}.gguf"
        write_gguf(file, source.merged, kind, tokenizer, source.stop_ids)
        text = ollama_file(tokenizer, source.stop_ids, source.num_ctx, weights=f"./{file.name}")
        (folder / "Modelfile").write_text(text, encoding="utf-8")

    def _kind(self, dtype: torch.dtype) -> str:
        from finery.models.gguf_writing import DTYPES

        asked = self.options.export_gguf_type
        return next(kind for kind, each in DTYPES.items() if each == dtype) if asked == "auto" else asked

    def limits(self, dtype: torch.dtype) -> Limits:
        """A merge is computed in fp32 and rounded once: the run's `dtype` counts where it is the file's."""
        from finery.models.gguf_writing import DTYPES

        kind = self._kind(dtype)
        if kind == "q8_0":
            return Limits(mean_kl=0.02, effect=(0.5, 1.5))
        limits = Limits.of(DTYPES[kind])
        return limits if DTYPES[kind] == dtype else replace(limits, exact=None)

    def open(self, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        """Read back by transformers, with what its reader does not look at."""
        from finery.models.gguf import convert

        (file,) = folder.glob("*.gguf")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            convert(file, Path(scratch), dtype)
            return super().open(Path(scratch), dtype)


def _name(source: Source) -> str:
    """What the base is called."""
    name = Path(source.base_name).name or source.found.base.name
    return name.removesuffix(".gguf")
