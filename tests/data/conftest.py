"""What the data tests share: real tokenizers with real chat templates, and small data folders."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from finery.data.load import DataOptions, Preparation, Sets, load_rows, load_sets
from finery.data.packing import PackingOptions
from finery.data.rows.base import Row, RowOptions
from finery.methods import METHODS


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
def load(tokenizer: Any) -> Iterator[Callable[..., Sets]]:
    """Load the set `x` of a folder with the tiny model's own template, as it stands in the files; what encodes ends with the test."""
    from finery.data.jinja import JinjaTemplate

    opened: list[Sets] = []

    def run(folder: str | dict[str, Any], seed: int = 7, key: str = "tests", stage: str = "sft", **options: Any) -> Sets:
        given = {"dataset": "x", "dataset_dir": folder, **options}
        data, shape, packing = ({name: given.pop(name) for name in group.model_fields if name in given} for group in GROUPS)
        assert not given, "no such option"
        method = METHODS[stage](METHODS[stage].Options())
        packs = PackingOptions(**packing)
        rows = load_rows(method.rows, JinjaTemplate(tokenizer), RowOptions(**shape), packs)
        prepared = Preparation(rows, method, key, seed, {"cache_dir": None, "tokens": {}}, sampling="sequential")
        opened.append(load_sets(DataOptions(**data), packs, prepared))
        return opened[-1]

    yield run
    for sets in opened:
        sets.stop()


GROUPS = (DataOptions, RowOptions, PackingOptions)


@pytest.fixture
def rows_of() -> Callable[[Any], list[Row]]:
    """All rows of a set, asked for as the loop does."""

    def read(units: Any) -> list[Row]:
        units.begin(0)
        found: list[Row] = []
        for unit in range(len(units)):
            units.advance(unit, 1)
            found += units[unit]
        return found

    return read


@pytest.fixture
def learnt(tokenizer: Any, rows_of: Callable[[Any], list[Row]]) -> Callable[[Any], list[str]]:
    """The learnt text of every row of a set, without the end of turn."""

    def read(units: Any) -> list[str]:
        return [tokenizer.decode(row.labels[row.labels >= 0]).removesuffix("<|im_end|>") for row in rows_of(units)]

    return read


@pytest.fixture(scope="session")
def specs(shared: Path) -> dict[str, dict[str, Any]]:
    """The reference's templates by name."""
    listed = json.loads((shared / "reference" / "templates.json").read_text(encoding="utf-8"))["templates"]
    return {spec["name"]: spec for spec in listed}
