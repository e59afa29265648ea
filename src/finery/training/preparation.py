"""What loading the data needs to know of the loop, the tokenizer and the template."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from finery.compat import num_ranks
from finery.data.load import Preparation
from finery.data.rows.base import RowOptions, Rows
from finery.data.template import Template, load_template
from finery.files import digest
from finery.log import get_logger
from finery.methods.base import Method
from finery.models.listed import template_of
from finery.models.new_tokens import give_tokens
from finery.models.positions import learnt_positions
from finery.training.arguments import LoopOptions

log = get_logger(__name__)


def prepare(loop: LoopOptions, rest: Mapping[str, Any], download: Mapping[str, Any], rows: Rows, method: Method) -> Preparation:
    """`rest` holds the keys that are handed to the trainer, `download` what the hubs are asked with."""
    data_seed = rest.get("data_seed")
    return Preparation(
        rows=rows,
        method=method,
        key=token_key(rows),
        seed=loop.seed,
        download=download,
        sampling="sequential" if loop.disable_shuffling else loop.train_sampling_strategy,
        order_seed=loop.seed if data_seed is None else data_seed,
        num_steps=loop.max_steps if loop.max_steps > 0 else None,
        step_size=loop.per_device_train_batch_size * loop.gradient_accumulation_steps * num_ranks(),
    )


def run_template(run: Any, tokenizer: Any) -> Template:
    """The template of a `finery.run.Run`; the list of models knows one where the tokenizer has none. The run's own tokens are added."""
    give_tokens(tokenizer, run.tokens)
    return load_template(run.template, tokenizer, partial(template_of, run.model.model_name_or_path), run.rows.mask_history)


def run_rows(run: Any, base: Path) -> RowOptions:
    """What a `finery.run.Run` asks of rows, which are never longer than the positions that the model in `base` has learnt."""
    most, asked = learnt_positions(base), run.rows.cutoff_len
    if most is None or asked <= most:
        return run.rows
    log.warning("'cutoff_len' is %s, but this model has learnt %s positions: rows are cut there", asked, most)
    return run.rows.model_copy(update={"cutoff_len": most})


def token_key(rows: Rows) -> str:
    """A digest of what turns text into tokens: vocabulary, rules and template."""
    template = rows.template
    tokenizer: Any = template.tokenizer
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    named = json.dumps([tokenizer.special_tokens_map, tokenizer.chat_template], sort_keys=True, default=str)  # what templates fill in
    return digest(rules, named, template.name, template.jinja or "", template.shape, repr(sorted(template.stop_ids)))
