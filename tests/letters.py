"""Data sets whose tokens are letters: the data tests do without a tokenizer where none is needed."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finery.data.load import DataOptions, Preparation, Sampling, Sets, load_sets
from finery.data.packing import PackingOptions
from finery.data.rows.base import Row, RowOptions, Rows
from finery.data.rows.text import Text
from finery.data.sample import BadRecord, Message, Sample
from finery.data.template import Template, Turn
from finery.data.tokenise import Asking
from finery.methods.pt import PT
from finery.methods.sft import SFT

Change = Callable[[str], None]


class Letters:
    """Stands for a template: a letter is a token. `seen` is called with each text before it is encoded."""

    late_end = None

    def __init__(self, seen: Change | None = None) -> None:
        self.seen = seen

    @property
    def tokenise(self) -> "Letters":
        """Stands for its own tokeniser, too."""
        return self

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The number of each letter."""
        return [[ord(letter) for letter in text] for text in texts]

    def text_ids(self, text: str) -> Asking[list[int]]:
        """The ids of a text, once it was seen."""
        if self.seen is not None:
            self.seen(text)
        (ids,) = yield [text]
        return ids


class Given(Template):
    """A template whose conversations are given, whatever the sample says."""

    def __init__(self, *conversations: list[Turn], late_end: int | None = None) -> None:
        self.conversations = list(conversations)
        self.late_end = late_end
        self.tokenise: Any = Letters()

    def turns(self, sample: Sample) -> Asking[list[list[Turn]]]:
        """They need no tokenizer."""
        yield from ()
        if not self.conversations:
            raise BadRecord("no conversation")
        return self.conversations

    def prompt_ids(self, messages: list[Message], system: str = "", tools: str = "") -> list[int]:
        """Nothing is served."""
        return []

    @property
    def jinja(self) -> str | None:
        """None."""
        return None


class Answers(Text):
    """The same rows, as a stage has them that learns from answers."""

    answers = True


def letter_rows(cutoff_len: int = 64, seen: Change | None = None, kind: type[Text] = Text, whole: bool = False, **options: Any) -> Text:
    """Rows of a data set's texts, a letter a token."""
    template: Any = Letters(seen)
    return kind(template, RowOptions(cutoff_len=cutoff_len, **options), whole)


def slowly(seconds: float) -> Change:
    """What makes the encoding of each text take so long."""

    def wait(text: str) -> None:
        time.sleep(seconds)

    return wait


def write_texts(path: Path, texts: Sequence[str], **entry: Any) -> dict[str, Any]:
    """Write a file of texts; returns its entry for a registry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {"file_name": str(path), "columns": {"prompt": "text"}, **entry}


def preparation(rows: Rows, **changes: Any) -> Preparation:
    """What `load_sets` needs beside options, for rows of letters."""
    given: dict[str, Any] = {
        "method": SFT(SFT.Options.model_validate({})) if rows.answers else PT(PT.Options()),
        "key": "letters",
        "seed": 7,
        "download": {},
    }
    return Preparation(rows=rows, **given | changes)


def open_sets(
    entries: Mapping[str, Any],
    rows: Rows | None = None,
    packing: PackingOptions | None = None,
    seed: int = 7,
    sampling: Sampling = "random",
    **options: Any,
) -> Sets:
    """Load the data sets of a registry given as a dict: all of them, unless `dataset` is given."""
    packing = packing or PackingOptions(packing=False)
    rows = rows or letter_rows(whole=packing.packs(False))
    data = DataOptions(**{"dataset": ",".join(entries), "dataset_dir": dict(entries), **options})
    return load_sets(data, packing, preparation(rows, seed=seed, order_seed=seed, sampling=sampling))


def spell(rows: Iterable[Row]) -> list[str]:
    """The texts of rows."""
    return ["".join(map(chr, row.ids.tolist())) for row in rows]


def in_order(units: Any) -> list[str]:
    """The texts of all rows of a set, unit by unit, in whatever order they are dealt."""
    units.begin(0)
    found: list[str] = []
    for unit in range(len(units)):
        units.advance(0, len(units))
        found += spell(units[unit])
    return found
