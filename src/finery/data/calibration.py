"""Texts by which a quantizer measures a model: documents are drawn, joined and cut into windows of tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finery.data.registry import Catalogue, read_catalogue
from finery.data.sample import BadRecord, Sample
from finery.data.sources import Source, open_source
from finery.errors import UserError
from finery.log import get_logger

log = get_logger(__name__)

COLUMN = "text"
MOST_CHARACTERS = 2_000_000
"""Of a longer text a piece of this length is drawn: no more of it is needed, and all of it would be tokenised."""


@dataclass(frozen=True)
class Corpus:
    """Where documents come from, and the dice by which they are drawn."""

    name: str  # a file, a folder or a pattern, a data set in dataset_info.json, or one on a hub
    dataset_dir: str | Mapping[str, Any]
    download: Mapping[str, Any]  # `cache_dir` and `tokens` for the hubs
    seed: int

    def open(self) -> Source:
        """Its records; raises `UserError`."""
        return open_source(self.name, self._catalogue, self.download, {}, {}, tells=False)

    @property
    def _catalogue(self) -> Catalogue:
        """What the name may mean; one with a slash that is nothing here is a hub's."""
        found = read_catalogue(self.dataset_dir, self.download) or Catalogue()
        is_hub = self.name not in found.entries and not found.path(self.name) and re.fullmatch(r"[\w.-]+/[\w.-]+", self.name)
        return replace(found, online=True) if is_hub else found


def calibration(corpus: Corpus, tokenizer: Any, render: Callable[[Sample], str], number: int, length: int) -> list[list[int]]:
    """At most `number` windows of `length` tokens; says how many there are. Raises `UserError` where there is none.

    A record's column `text` is a document; where it has none, the conversation that it holds is, as `render` writes it.
    """
    dice = random.Random(corpus.seed)
    texts = _Texts(corpus.open(), render, dice)
    before, end = _frame(tokenizer)
    documents = ([*tokenizer(text, add_special_tokens=False)["input_ids"], *end] for text in texts)
    found = [_begun(window, before) for window in windows(documents, number, length - len(before), dice)]
    if not found:
        raise UserError(f"'export_quantization_dataset': {corpus.name!r} holds no text to calibrate with{texts.reason}")
    log.info(
        "calibration: %d windows of %s tokens from %d of the %d documents in %s%s",
        *(len(found), _lengths(found), texts.num_read, len(texts.source), corpus.name),
        "" if len(found) == number else f"; {number} were asked for ('export_quantization_nsamples')",
    )
    return found


def windows(documents: Iterable[list[int]], number: int, length: int, dice: random.Random) -> list[list[int]]:
    """At most `number` windows of `length` tokens, the last of which may be shorter, from documents laid end to end.

    A document that is longer than a window gives one, from a place that the dice choose; the rest of it is taken only where the
    others do not suffice.
    """
    found: list[list[int]] = []
    held: list[int] = []
    rest: list[list[int]] = []

    def pieces() -> Iterator[list[int]]:
        for ids in documents:
            start = dice.randrange(len(ids) - length + 1) if len(ids) > length else 0
            rest.extend(part for part in (ids[:start], ids[start + length :]) if part)
            yield ids[start : start + length]
        dice.shuffle(rest)
        yield from rest

    for piece in pieces():
        held += piece
        cut = min(len(held) // length, number - len(found))
        found += [held[at * length : (at + 1) * length] for at in range(cut)]
        held = held[cut * length :]
        if len(found) == number:
            return found
    return [*found, held] if held else found


class _Texts:
    """The documents of a source in an order that the dice choose."""

    def __init__(self, source: Source, render: Callable[[Sample], str], dice: random.Random) -> None:
        self.source = source
        self.render = render
        self.dice = dice
        self.num_read = 0
        self.reason = ""  # why a record was left out

    def __iter__(self) -> Iterator[str]:
        rows = list(range(len(self.source)))
        self.dice.shuffle(rows)
        for row in rows:
            try:
                text = self._text(self.source.record(row))
            except BadRecord as error:
                self.reason = self.reason or f": {self.source.place(row)}: {error}"
                continue
            if not text.strip():
                self.reason = self.reason or f": {self.source.place(row)} is empty"
                continue
            self.num_read += 1
            start = self.dice.randrange(max(len(text) - MOST_CHARACTERS, 0) + 1)
            yield text[start : start + MOST_CHARACTERS]

    def _text(self, record: Any) -> str:
        if isinstance(record, Mapping) and isinstance(record.get(COLUMN), str):
            return record[COLUMN]
        sample = self.source.read(record)
        alone = len(sample.messages) == 1 and sample.chosen is None and not sample.system
        return sample.messages[0].content if alone else self.render(sample)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, and the end token that closes a document."""
    bare, framed = list(tokenizer("a", add_special_tokens=False)["input_ids"]), list(tokenizer("a")["input_ids"])
    start = next((at for at in range(len(framed)) if framed[at : at + len(bare)] == bare), 0)
    return framed[:start], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _begun(window: list[int], before: Sequence[int]) -> list[int]:
    """Every window begins as a text does."""
    return window if window[: len(before)] == before else [*before, *window]


def _lengths(found: Sequence[Sequence[int]]) -> str:
    least, most = min(map(len, found)), max(map(len, found))
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"
