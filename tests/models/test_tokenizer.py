"""Tokenizers are saved so that they can be loaded again."""

import json
from pathlib import Path

import pytest

from conftest import build_tokenizer
from finery.models.tokenizer import load_tokenizer, save_tokenizer

CODE = """
from transformers import PreTrainedTokenizerFast

class Mine(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("told", [[None, "mine.Mine"], "mine.Mine"], ids=str)
def test_one_with_code_of_its_own(told: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers writes the name of the class in a form that it does not read."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source, saved = tmp_path / "source", tmp_path / "saved"
    build_tokenizer(source)
    (source / "mine.py").write_text(CODE)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "tokenizer_class": "Mine"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(source, True)
    assert type(tokenizer).__name__ == "Mine"
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": told}
    save_tokenizer(tokenizer, saved, None)
    again = load_tokenizer(saved, True)
    assert type(again).__name__ == "Mine"
    assert again("Who are you?")["input_ids"] == tokenizer("Who are you?")["input_ids"]
