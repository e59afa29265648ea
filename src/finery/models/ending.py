"""Where answers end: stop tokens beside a model's weights, for every server that loads them."""

import copy
from pathlib import Path
from typing import Any


def save_stop_tokens(model: Any, folder: Path, stop_ids: frozenset[int]) -> None:
    """The model's generation config with every token at which an answer ends, so that other servers stop there, too."""
    from transformers import GenerationConfig

    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.eos_token_id = sorted(stop_ids)
    if not config.do_sample:  # settings of a sampling that is off would be refused
        config.temperature = config.top_p = config.top_k = None
    config.save_pretrained(str(folder))
