"""Models that come as a GGUF file: widened once into a folder of safetensors, and plain models from then on."""

from pathlib import Path
from typing import Any

from finery.compat import quiet_transformers
from finery.errors import UserError
from finery.files import cache_folder, digest, new_folder
from finery.hub import folder_of
from finery.log import get_logger

log = get_logger(__name__)

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen 2 split text; they differ in how many digits stand together."""
DIGITS = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
"""By the name that a GGUF file gives its pre-tokenizer (`tokenizer.ggml.pre`)."""


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a name means: the file itself, or the only one in a folder without config.json; raises `UserError` for several."""
    path = folder_of(name)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"'model_name_or_path': {path} holds {len(files)} GGUF files; name one of them, such as {files[0]}")
    return files[0] if files else None


def plain_folder(file: Path) -> Path:
    """The folder with what the file holds, in Finery's cache; made when it is first asked for."""
    facts = file.stat()
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest(str(file.resolve()), str(facts.st_size), str(facts.st_mtime_ns))[:12]}"
    if not (folder / "config.json").exists():
        log.info("widening %s into %s (once)", file, folder)
        with new_folder(folder) as beside:
            convert(file, beside)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Weights in bf16, config and tokenizer, with what the conversion loses; raises `UserError` for what cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from finery.models.tokenizer import save_tokenizer  # which itself knows of names and folders

    quiet_transformers()
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    facts = _facts(file)
    try:
        # a GGUF is loaded packed unless it is asked to be plain, and packed weights cannot be trained or saved
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
        tokenizer: Any = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, NotImplementedError, ImportError) as error:
        raise UserError(f"{file} holds no model that can be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if eps := getattr(model.config, "rms_norm_eps", None):
        model.config.rms_norm_eps = float(f"{eps:.4g}")  # the file holds it rounded to fp32
    if context := facts.get("context_length"):
        model.config.max_position_embeddings = tokenizer.model_max_length = int(context)
    for holder in (model, model.config):
        holder.__dict__.pop("quantization_config", None)
    model.save_pretrained(str(folder))
    _mend_splitting(tokenizer, str(facts.get("pre", "")))
    save_tokenizer(tokenizer, folder, tokenizer.chat_template)


def _facts(file: Path) -> dict[str, Any]:
    """`context_length` and `pre`, the name of the pre-tokenizer."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(file)).fields
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{file} is no GGUF file: {error}") from None
    wanted = {"context_length": ".context_length", "pre": "tokenizer.ggml.pre"}
    return {name: field.contents() for name, end in wanted.items() for key, field in fields.items() if key.endswith(end)}


def _mend_splitting(tokenizer: Any, pre: str) -> None:
    """How text is split before tokens are sought: the conversion keeps the vocabulary, and splits all families alike."""
    from tokenizers import Regex, pre_tokenizers

    if pre == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif pre in DIGITS:
        first = pre_tokenizers.Split(Regex(WORDS % DIGITS[pre]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        # Llama 3 takes a word that is a token as it is, even where its merges would end elsewhere
        tokenizer.backend_tokenizer.model.ignore_merges = pre == "llama-bpe"
    else:
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
