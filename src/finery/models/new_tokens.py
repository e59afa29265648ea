"""Tokens that a run adds to a model, and what their rows begin with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from finery.errors import UserError
from finery.log import get_logger
from finery.options import CommaList, Finding, OptionGroup, PathText

if TYPE_CHECKING:
    from torch import Tensor

log = get_logger(__name__)

Start = Literal["noise_init", "desc_init", "desc_init_w_noise"]


class TokenOptions(OptionGroup):
    add_tokens: CommaList = ()
    """Words that become one token each."""
    add_special_tokens: CommaList = ()
    """Marks that become one special token each: they are never split, and left out of answers."""
    new_special_tokens_config: PathText | None = None
    """A YAML file of special tokens and what each means; it counts instead of add_special_tokens."""
    init_special_tokens: Start = "noise_init"
    """What new rows begin with: the mean of the old rows with noise, or the mean of the rows of a token's description (desc_init), with
    noise (desc_init_w_noise)."""

    @property
    def special(self) -> tuple[str, ...]:
        """The special tokens that are added."""
        return tuple(descriptions(self)) or self.add_special_tokens

    def check(self, run: Any) -> Iterator[Finding]:
        """Descriptions are in the file; the file counts alone."""
        if self.init_special_tokens != "noise_init" and not self.new_special_tokens_config:
            text = "begins with descriptions, which 'new_special_tokens_config' would hold: the mean of all rows is taken"
            yield Finding("init_special_tokens", text, fatal=False)
        if self.new_special_tokens_config and self.add_special_tokens:
            yield Finding("new_special_tokens_config", "counts, and not 'add_special_tokens'", fatal=False)
        if self.new_special_tokens_config:
            try:
                descriptions(self)
            except UserError as error:
                yield Finding("new_special_tokens_config", str(error))


def descriptions(options: TokenOptions) -> Mapping[str, str]:
    """Special tokens and what each means, from the file; raises `UserError` where it is no mapping of texts."""
    if options.new_special_tokens_config is None:
        return {}
    path = Path(options.new_special_tokens_config)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"should be a YAML file; {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not found or any(not isinstance(text, str) for pair in found.items() for text in pair):
        raise UserError(f'should map tokens to their descriptions ("<token>": "what it means"); {path} does not')
    return found


def give_tokens(tokenizer: Any, options: TokenOptions) -> None:
    """Let the tokenizer know the new words and marks; what it knows already is left as it is, and said."""
    for kind, names in (("tokens", list(options.add_tokens)), ("special tokens", list(options.special))):
        fresh = [name for name in names if name not in tokenizer.get_vocab()]
        if not names:
            continue
        tokenizer.add_tokens(fresh, special_tokens=kind == "special tokens")
        known = [name for name in names if name not in fresh]
        log.info("%d %s added%s", len(fresh), kind, f"; known before: {', '.join(known)}" if known else "")


def token_layers(model: Any) -> list[Any]:
    """The layers that hold a row for every token; the head counts where it is not tied to the embedding."""
    layers = (model.get_output_embeddings(), model.get_input_embeddings())
    return list({id(layer.weight): layer for layer in layers if layer is not None}.values())


def start_rows(model: Any, tokenizer: Any, new: range, made_from: int, options: TokenOptions | None) -> None:
    """New rows start as the mean of the old ones, with a little noise so that they can part; what fills up to 64 is the mean itself.

    Rows from `made_from` on are such a filling; those that the model has to spare before it stay as they are. Rows of described tokens
    start as `init_special_tokens` says.
    """
    for layer in token_layers(model):
        weight = layer.weight.data
        begin_rows(weight, new, made_from)
        if options is not None and options.init_special_tokens != "noise_init":
            _describe(weight, tokenizer, new, options)


def begin_rows(weight: Tensor, new: range, made_from: int) -> None:
    """Write what new rows of one weight (tokens, dimensions) start as, see `start_rows`."""
    import torch

    mean = weight[: new.start].float().mean(0)
    noise = torch.randn(len(new), weight.shape[1], generator=torch.Generator().manual_seed(0)) / weight.shape[1] ** 0.5
    weight[made_from:] = mean.to(weight.dtype)
    weight[new.start : new.stop] = (mean + noise.to(mean.device)).to(weight.dtype)


def _describe(weight: Tensor, tokenizer: Any, new: range, options: TokenOptions) -> None:
    import torch

    dice = torch.Generator().manual_seed(0)
    for name, text in descriptions(options).items():
        (row,) = tokenizer.convert_tokens_to_ids([name])
        ids = [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token < new.start]
        if row in new and ids:
            mean = weight[ids].float().mean(0)
            noise = torch.randn(mean.shape, generator=dice) / mean.shape[0] ** 0.5
            weight[row] = (mean + noise.to(mean.device) * (options.init_special_tokens == "desc_init_w_noise")).to(weight.dtype)


def tell_untrained(model: Any, new: range) -> None:
    """Say where new rows stay what they started as."""
    trained = any(weight.requires_grad and ("embed" in name or "token_adapter" in name) for name, weight in model.named_parameters())
    if new and not trained:
        log.warning(
            "the rows of %d new tokens are not trained by this 'finetuning_type': 'additional_target' may name the embedding", len(new)
        )
