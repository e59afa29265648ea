"""What the data tests share: real tokenizers with real chat templates, and small data folders."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from finery.data.load import DataOptions, Sets, load_sets
from finery.data.rows.chat import Chat


@pytest.fixture(scope="session")
def vendor(shared: Path) -> Callable[[str], Any]:
    """A vendor's chat template by the beginning of its name, on the vocabulary that belongs to it; built once a session.

    The tokenizer is the session's: change a copy.
    """
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    folder = shared / "vendor"
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))["templates"]

    @cache
    def load(name: str) -> Any:
        (file,) = [file for file in index if file.startswith(name)]
        entry = index[file]
        tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizers" / entry["tokenizer"]), **entry["bos_eos"])
        extra = [AddedToken(token, special=True, normalized=False) for token in entry["extra_special_tokens"]]
        tokenizer.add_tokens(extra, special_tokens=True)
        tokenizer.chat_template = (folder / "templates" / file).read_text(encoding="utf-8")
        return tokenizer

    return load


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    """The tiny model's tokenizer, new for every test."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_model))


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., str]:
    """Write a data set `x` and its dataset_info.json; returns the folder. Text is written as it is, all else as JSON."""

    def write(content: Any, file_name: str = "x.json", **entry: Any) -> str:
        path = tmp_path / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
        (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": file_name, **entry}}))
        return str(tmp_path)

    return write


@pytest.fixture
def load(tokenizer: Any) -> Callable[..., Sets]:
    """Load the set `x` of a folder with the tiny model's own template."""
    from finery.data.jinja import JinjaTemplate

    def run(folder: str | dict[str, Any], seed: int = 7, key: str = "tests", **options: Any) -> Sets:
        data = DataOptions(**{"dataset": "x", "dataset_dir": folder, **options})
        return load_sets(data, Chat(JinjaTemplate(tokenizer), data.cutoff_len), seed, {"cache_dir": None, "tokens": {}}, key)

    return run


@pytest.fixture
def learnt(tokenizer: Any) -> Callable[[Any], list[str]]:
    """The learnt text of every row of a set, without the end of turn."""

    def read(encoded: Any) -> list[str]:
        rows = [row for unit in encoded for row in unit]
        return [tokenizer.decode(row.labels[row.labels >= 0]).removesuffix("<|im_end|>") for row in rows]

    return read
