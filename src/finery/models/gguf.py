"""Models that come as a GGUF file: widened once into a folder of safetensors, and plain models from then on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.compat import quiet_transformers
from finery.errors import UserError
from finery.files import cache_folder, digest, new_folder
from finery.hub import folder_of
from finery.log import get_logger

if TYPE_CHECKING:
    import torch

    from finery.models.gguf_reading import Contents

log = get_logger(__name__)


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


def convert(file: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Weights (in 32 or 16 bits as in the file, else in bf16), config and tokenizer; raises `UserError` for what cannot be read."""
    from finery.models.gguf_reading import Contents, mend_tokens
    from finery.models.tokenizer import save_tokenizer  # which itself knows of names and folders

    quiet_transformers()
    contents = Contents(file)
    facts = contents.facts
    try:
        model = _model(contents, dtype or contents.dtype)
        tokenizer = _tokenizer(contents)
    except (OSError, ValueError, KeyError, NotImplementedError, ImportError) as error:
        raise UserError(f"{file} holds no model that can be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if eps := getattr(model.config, "rms_norm_eps", None):
        model.config.rms_norm_eps = float(f"{eps:.4g}")  # the file holds it rounded to fp32
    if context := contents.shape.get("context_length"):
        model.config.max_position_embeddings = tokenizer.model_max_length = int(context)
    if len(stops := contents.stop_ids) > 1:
        model.generation_config.eos_token_id = stops
    for holder in (model, model.config):
        holder.__dict__.pop("quantization_config", None)
    model.save_pretrained(str(folder))
    mend_tokens(tokenizer, contents)
    save_tokenizer(tokenizer, folder, facts.get("tokenizer.chat_template"))


def _model(contents: Contents, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    from finery.models.gguf_reading import read_config, read_weights

    file, family = contents.file, contents.family
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**where) if family is None else read_config(contents, family)
    if family is not None and (family.arch not in GGUF_SUPPORTED_ARCHITECTURES or config.model_type == "mistral"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(dict(read_weights(contents, model, family)), strict=False)
        model.tie_weights()
        return model
    # a GGUF is loaded packed unless it is asked to be plain, and packed weights cannot be trained or saved
    return AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=dtype, quantization_config=GgufConfig(dequantize=True))


def _tokenizer(contents: Contents) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = AutoTokenizer if contents.family is None else PreTrainedTokenizerFast
    return kind.from_pretrained(str(contents.file.parent), gguf_file=contents.file.name)
