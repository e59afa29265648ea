"""Where the tokens of each data set are kept, and under which key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.data.claim import claim, is_writer
from finery.data.sources import Source
from finery.data.store import TokenStore, check_key, code_version
from finery.errors import UserError
from finery.files import cache_folder, digest

if TYPE_CHECKING:
    from finery.data.load import DataOptions, Preparation

FOREIGN = ("dataset_dict.json", "state.json")
"""Files by which a folder of encoded data of another program is known."""


def open_stores(options: DataOptions, prepared: Preparation, sources: Sequence[Source]) -> tuple[list[TokenStore], bool]:
    """A store for each data set, and whether this process writes them."""
    writes = is_writer()
    stores = []
    for source in sources:
        key = store_key(source, prepared)
        if options.tokenized_path is None:
            folder = cache_folder() / "encoded" / digest(*(f"{name} {value}" for name, value in key.items()))
            folder = claim(folder, writes, options.overwrite_cache)
        else:
            folder = _chosen(Path(options.tokenized_path), source, key, options.overwrite_cache)
            folder = claim(folder, writes, options.overwrite_cache, only_here=True)
        stores.append(TokenStore.create(folder, len(source), key) if writes else TokenStore(folder, len(source)))
    return stores, writes


def store_key(source: Source, prepared: Preparation) -> dict[str, Any]:
    """All that shapes the tokens of a data set, in words that people can compare."""
    rows = prepared.rows
    return {
        "files": " ".join(source.contents),
        "formatting": source.entry.formatting,
        "columns": source.entry.columns.model_dump_json(exclude_unset=True),
        "tags": source.entry.tags.model_dump_json(exclude_unset=True),
        "placeholders": dict(source.placeholders),
        "rows": type(rows).__name__,
        **rows.options.model_dump(mode="json"),
        "whole": rows.whole,
        "tokenizer and template": prepared.key,
        "versions of Finery": code_version(),
    }


def _chosen(folder: Path, source: Source, key: dict[str, Any], anew: bool) -> Path:
    if any((folder / name).exists() for name in FOREIGN):
        wanted = "name another folder: encoding takes little time, and the settings that it was made with are not known"
        raise UserError(f"'tokenized_path': {folder} holds data that another program has encoded; {wanted}")
    plain = re.sub(r"[^\w.-]+", "_", source.name)
    own = folder / (plain if plain == source.name else f"{plain}.{digest(source.name)[:8]}")  # a/b and a_b are two
    if not anew:
        check_key(own, key, len(source))
    return own
