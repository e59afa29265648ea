"""Adapters that another library keeps beside the base model, as it asks for them."""

from __future__ import annotations

import json
from pathlib import Path

from finery.engines.base import Source
from finery.errors import UserError


def base_and_adapters(source: Source, engine: str) -> tuple[Path, dict[str, Path], str | None]:
    """The folder of the base, those of adapters by name, and which of them answers where no name is asked for.

    Raises `UserError` where adapters would have to be merged first, or are none of LoRA.
    """
    found = source.trained
    if len(found.adapters) > 1:
        raise UserError(f"'infer_backend: {engine}' takes one adapter, found {len(found.adapters)}: merge them (`finery export`)")
    if found.change is not None:
        raise UserError(
            f"'infer_backend: {engine}' takes positions from the model's config alone: merge what was trained (`finery export`)"
        )
    folders = dict(source.served)
    usual = None
    if found.adapters:
        usual = free_name(found.adapters[0].name or "adapter", folders)
        folders = {usual: found.adapters[0]} | folders
    for folder in folders.values():
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
        if kind != "LORA":
            raise UserError(
                f"'infer_backend: {engine}' keeps adapters of LoRA beside a model, and {folder} is of {kind}: merge it (`finery export`)"
            )
    return found.base, folders, usual


def free_name(name: str, taken: dict[str, Path]) -> str:
    """The name, or one like it that is not taken."""
    while name in taken:
        name += "_"
    return name


def most_rank(folders: dict[str, Path]) -> int:
    """The largest rank among adapters of LoRA."""
    ranks = [1]
    for folder in folders.values():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        ranks += [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
    return max(ranks)
