"""The GGUF file of what is to answer: the one that a run names, or one that is written into Finery's cache first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from finery.engines.base import Source
from finery.errors import UserError
from finery.files import cache_folder, digest, new_folder
from finery.log import get_logger
from finery.options import Finding

log = get_logger(__name__)

_READ = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")
_STATE = "made_of.txt"


def check_gguf(run: Any) -> Iterator[Finding]:
    """A GGUF file has its own bits, and one model in it."""
    name = run.choices.infer_backend
    if run.quantization.quantization_bit:
        yield Finding("quantization_bit", f"does not fit 'infer_backend: {name}', whose file says in how many bits: set 'gguf_type'")
    if run.model.served_adapters:
        text = f"does not fit 'infer_backend: {name}', which answers with one model: give one as 'adapter_name_or_path'"
        yield Finding("served_adapters", text)


def served_gguf(source: Source, usual: Literal["q8_0", "f16"]) -> Path:
    """The file itself where the run names one and nothing goes into it, else one with everything merged; raises `UserError`.

    One file is kept for each model and kind; it is written anew when what it was made of has changed.
    """
    from finery.models.gguf import gguf_of

    found, kind = source.trained, source.shared.gguf_type or usual
    file = gguf_of(source.model.model_name_or_path)
    if file is not None and not found.is_tuned and found.change is None:
        return file
    folders = (found.base, *found.adapters)
    where = digest(*(str(folder.resolve()) for folder in folders))[:12]
    folder = cache_folder() / "served" / f"{folders[-1].name}-{kind}-{where}"
    state, written = _state(source), folder / "model.gguf"
    if not written.exists() or not _is(folder / _STATE, state):
        log.info("writing %s as a GGUF file of %s into %s (once)", " with ".join(map(str, folders)), kind, folder)
        with new_folder(folder) as beside:
            _write(source, beside / written.name, kind)
            (beside / _STATE).write_text(state, encoding="utf-8")
    return written


def _write(source: Source, file: Path, kind: str) -> None:
    import torch

    from finery.models.gguf_writing import write_gguf
    from finery.models.merging import merged

    trust = source.model.trust_remote_code
    whole = merged(source.trained, source.adapter, source.tokenizer, trust, torch.float32, torch.device("cpu"))
    try:
        write_gguf(file, whole, kind, source.tokenizer, source.stop_ids)
    except UserError as error:
        text = "; ".join(error.complaints).replace("'export_format: gguf'", "GGUF")
        raise UserError(f"'infer_backend': this model cannot be served from a GGUF file: {text}") from None


def _state(source: Source) -> str:
    """What a file is made of: names, sizes and times, the words of the tokenizer that stop, and how positions are scaled."""
    found = source.trained
    lines = [f"stop {sorted(source.stop_ids)}", f"rope {found.rope_scaling}", f"tokens {len(source.tokenizer)}"]
    for folder in dict.fromkeys((found.base, *found.adapters, found.tokenizer_folder)):
        for path in sorted({path for pattern in _READ for path in folder.glob(pattern)}):
            facts = path.stat()
            lines.append(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}")
    return "\n".join(lines) + "\n"


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text
