"""What engines look at before they take an answer on, and what they say of what they cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finery.engines.base import Ask, Source
from finery.errors import UserError


def look_at(ask: Ask, longest: int, adapters: Sequence[str] = ()) -> None:
    """Raise `UserError` for a prompt that cannot be answered, or an adapter that is not there."""
    if not ask.prompt_ids:
        raise UserError("there is nothing to answer: the prompt has no token")
    if len(ask.prompt_ids) >= longest:
        raise UserError(f"the prompt has {len(ask.prompt_ids):,} tokens, and the model takes {longest:,} with its answer")
    if ask.adapter is not None and ask.adapter not in adapters:
        raise UserError(f"there is no adapter {ask.adapter!r}; there are: {', '.join(adapters) or 'none'}")


def refuse(engine: str, what: str) -> UserError:
    """What is said of a wish that an engine does not have the means for."""
    return UserError(f"'infer_backend: {engine}' cannot {what}; 'infer_backend: huggingface' does")


def config_of(source: Source) -> Any:
    """The text model's config, with positions as what was trained has changed them."""
    from finery.models.load import read_model_config

    found = source.trained
    return read_model_config(found.base, source.model.trust_remote_code, found.change).get_text_config()


def positions_of(config: Any) -> int:
    """How many tokens a model has places for; where its config does not tell, there is no limit."""
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def plain_positions_of(config: Any, engine: str) -> int:
    """For an engine that reads of a file's positions their base alone: raises `UserError` where they are scaled.

    Where layers see a window of the last tokens, no text may be longer than it.
    """
    told = getattr(config, "rope_parameters", None) or {}
    for parameters in [each for each in told.values() if isinstance(each, dict)] or [told]:
        if (kind := parameters.get("rope_type", "default")) != "default":
            text = f"'infer_backend: {engine}' would leave out this model's scaled positions (rope_type {kind})"
            raise UserError(f"{text}; llamacpp and huggingface do not")
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = (getattr(config, "sliding_window", None) if windows else None) or 2**31
    return min(positions_of(config), int(window))
