"""Tokenizers, loaded from a folder or a hub."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finery.models.load import not_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""How a model that sees or hears reads images, videos and sounds."""


def load_tokenizer(folder: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder, padding on the right for training; raises `UserError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, padding_side="right")
    except (OSError, ValueError, KeyError) as error:
        raise not_loaded(folder, "tokenizer", error) from None
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def own_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The Jinja of the model's own chat template, of several the one that is used without a name; empty where there is none."""
    found = tokenizer.chat_template
    return str(found.get("default", "") if isinstance(found, dict) else found or "")


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path, jinja: str | None) -> None:
    """Save with the template that was really used; the class name is one that transformers 4 knows, too.

    What processes images and sounds lies beside the tokenizer that was loaded, and goes with it.
    """
    import json

    if jinja is not None:
        tokenizer.chat_template = jinja
    tokenizer.save_pretrained(str(folder))
    for path in (Path(tokenizer.name_or_path) / name for name in PROCESSORS):
        if path.exists() and not (folder / path.name).exists():
            shutil.copy2(path, folder / path.name)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    own = config.get("auto_map", {}).get("AutoTokenizer")
    if isinstance(own, str):  # as transformers 5.23 writes it, and does not read it
        config["auto_map"]["AutoTokenizer"] = [None, own] if tokenizer.is_fast else [own, None]
    if json.dumps(config) != before:
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
