"""One adapter made of several, by weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finery.errors import UserError
from finery.log import get_logger
from finery.models.merging import hollow_model
from finery.models.peft_adapter import open_adapter, read_config

log = get_logger(__name__)

NAME = "blend"


def blend(base: Path, folders: Sequence[Path], how: str, weights: Sequence[float], density: float, target: Path, seed: int) -> Path:
    """Save in `target` one LoRA made of those in `folders`; returns its folder. No weight of the base is read.

    `how` is one of peft's combination types (linear, TIES: Yadav et al., 2023, arXiv 2306.01708; DARE: Yu et al., 2023, arXiv 2311.03099);
    DARE draws with `seed`. Raises `UserError` for adapters that cannot be blended so.
    """
    for folder in folders:
        found = read_config(folder)
        beside = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if found.get(key)]
        if found.get("peft_type") != "LORA" or beside:
            what = f"a LoRA with {beside[0]}" if beside else "no LoRA"
            raise UserError(f"'export_merge_type': {folder} holds {what}, which cannot be blended; merge one after the other instead")
    model = open_adapter(hollow_model(base), folders[0], is_light=True)
    names = [model.active_adapter]
    for number, folder in enumerate(folders[1:]):
        names.append(f"other-{number}")
        model.load_adapter(str(folder), names[-1], low_cpu_mem_usage=True)
    chosen = list(weights) or [1.0] * len(folders)
    kept: dict[str, Any] = {"density": density} if how not in ("cat", "linear", "svd") else {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_weighted_adapter(names, chosen, NAME, combination_type=how, **kept)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"'export_merge_type: {how}' does not fit these adapters: {' '.join(str(error).split())[:200]}") from None
    model.save_pretrained(str(target), selected_adapters=[NAME], save_embedding_layers=False)
    told = ", ".join(f"{weight:g} x {folder}" for weight, folder in zip(chosen, folders, strict=True))
    log.info("one adapter made by %s of %s", how, told)
    return target / NAME
