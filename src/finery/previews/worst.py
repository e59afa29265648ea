"""The rows that a run has learnt worst, out of its loss ledger, with a piece of their text."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finery.data.sample import BadRecord
from finery.data.sources import Source
from finery.errors import UserError, suggestion
from finery.training.loss_ledger import FOLDER, last_losses, read_ledger

NUM_CHARACTERS = 160
"""Of a row's last question, and of its answer, so many are shown."""


@dataclass(frozen=True)
class Worst:
    """A row as `finery show --worst --json` writes it."""

    dataset: str
    file: str
    row: int  # from 0 in its file
    loss: float  # of a supervised token, when the row was last trained on
    tokens: int
    step: int
    sharers: int  # how many samples this loss is of
    text: str = ""  # the last two messages; empty where this run's data no longer have the row

    def as_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def worst(folder: Path, sources: Sequence[Source], number: int, dataset: str | None = None) -> Iterator[Worst]:
    """The rows with the highest losses of a run in `folder`, of one data set or of all; raises `UserError` where it kept no ledger."""
    found = last_losses(read_ledger(folder / FOLDER))
    names = sorted({one["dataset"] for one in found})
    if dataset is not None and dataset not in names:
        raise UserError(f"--dataset: the ledger has no data set {dataset!r}{suggestion(dataset, names)}; it has: {', '.join(names)}")
    chosen = [one for one in found if dataset in (None, one["dataset"])]
    for one in chosen[:number]:
        yield Worst(**one, text=_text(sources, one))


def _text(sources: Sequence[Source], one: dict[str, Any]) -> str:
    for source in sources:
        for table, end in zip(source.tables, source.ends.tolist(), strict=True):
            if (source.name, str(table.told_as)) == (one["dataset"], one["file"]) and one["row"] < len(table):
                try:
                    messages = source.sample(end - len(table) + one["row"]).messages[-2:]
                except BadRecord:
                    return ""
                return "\n".join(f"{message.role}: {_begins(message.content)}" for message in messages)
    return ""


def _begins(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= NUM_CHARACTERS else f"{text[:NUM_CHARACTERS]} …"


def draw(rows: Iterable[Worst], console: Console) -> None:
    """As a table."""
    table = Table(show_edge=False, pad_edge=False, leading=1)
    for name in ("loss", "tokens", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where", overflow="fold")
    table.add_column("text", overflow="fold", ratio=1)
    for one in rows:
        shared = f"\n(one of {one.sharers} in a text)" if one.sharers > 1 else ""
        where = f"{one.dataset} row {one.row}{shared}"
        table.add_row(f"{one.loss:.4g}", f"{one.tokens:,}", f"{one.step:,}", where, one.text)
    console.print(table)
