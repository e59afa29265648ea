"""What a kind of row is: it encodes samples and collates rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finery.data.sample import Sample
from finery.data.template import Template
from finery.data.tokenise import Asking, together
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

IGNORED = -100
"""A label that the loss does not see."""


class RowOptions(OptionGroup):
    cutoff_len: int = Field(2048, gt=0)
    """The most tokens of a row; 'truncation' says what becomes of longer ones."""
    truncation: Literal["proportional", "drop", "error", "keep_start", "keep_end", "split"] = "proportional"
    """What becomes of a row that is longer than cutoff_len: question and answer are shortened in proportion, the sample is left out, the
    run stops, the beginning or the end is kept, or the row is split into several."""
    train_on_prompt: bool = False
    """Learn the questions, too."""
    mask_history: bool = False
    """Learn only the last answer of a conversation; where it has to be cut, the last turns are kept."""

    def check(self, run: Any) -> Iterator[Finding]:
        """The masks exclude each other."""
        if self.train_on_prompt and self.mask_history:
            yield Finding("mask_history", "and 'train_on_prompt' exclude each other: keep one")
        for key in ("train_on_prompt", "mask_history"):
            if getattr(self, key) and run.method.rows != "chat":
                yield Finding(key, f"belongs to supervised training; this stage learns from rows of another kind ({run.method.rows})")


class Cut:
    """Flags: what a cut took beside text, and what else the ledger counts of a sample."""

    NOTHING = 0
    END_LOST = 1  # an answer without its end: the model does not see where to stop
    HEADER_LOST = 2  # a question without its end, where the header of the answer's role stands, or a row that begins within a turn
    TRAILING = 4  # messages after the last answer, which nothing follows
    PER_TURN = 8  # nothing is cut: each answer is a row of its own, since the template rewrites history


@dataclass(frozen=True)
class Row:
    """Token ids and labels of one row, T each, int32; a label is the id at its own place, or `IGNORED`."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    positions: NDArray[np.int32] | None = None  # T, where they do not run from 0 to T - 1
    origin: tuple[int, ...] = ()  # the places, in the set that dealt it, of the samples that it is made of

    @property
    def num_supervised(self) -> int:
        """Tokens that the loss counts: the first token of a row is never predicted."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Encoded:
    """What a sample became: rows, or none and the reason; and how many tokens were cut away, and what was lost by that."""

    rows: tuple[Row, ...]
    reason: str = ""
    num_cut: int = 0
    cut: int = Cut.NOTHING
    num_supervised: int = 0


class Rows(ABC):
    """Encodes one sample, collates many rows."""

    answers = True  # learns from answers; else from text alone

    def __init__(self, template: Template, options: RowOptions, whole: bool = False) -> None:
        """With `whole`, rows are laid end to end and cut into blocks later: kinds that can be are not cut before."""
        self.template = template
        self.options = options
        self.whole = whole

    @abstractmethod
    def draft(self, sample: Sample) -> Asking[Any]:
        """What a sample becomes, as far as that is told from it alone; raises `UserError` only where `truncation: error` asks for it."""

    @abstractmethod
    def finish(self, drafts: Sequence[Any]) -> list[Encoded]:
        """The rest, for many samples at once, since that costs less."""

    def encode(self, sample: Sample) -> Encoded:
        """All rows that a sample yields, or why there are none."""
        return self.finish(together([self.draft(sample)], self.template.tokenise.ids))[0]

    @abstractmethod
    def collate(self, rows: Sequence[Row], end_to_end: bool = False) -> dict[str, torch.Tensor]:
        """A batch that the method's loss reads: rows padded to the longest, or laid end to end."""


def lay(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Lay rows end to end: `input_ids`, `position_ids`, `labels`, each (1, T of all), int64, and where rows begin and end.

    `cu_seq_lens_q`, `cu_seq_lens_k` (rows + 1, int32), `max_length_q` and `max_length_k` are what transformers hands to attention.
    """
    import numpy as np
    import torch

    positions = [row.positions if row.positions is not None else np.arange(len(row.ids)) for row in rows]
    labels = [np.concatenate(([IGNORED], row.labels[1:])) for row in rows]  # nothing predicts the first token of a row
    arrays = {"input_ids": [row.ids for row in rows], "position_ids": positions, "labels": labels}
    batch = {name: torch.from_numpy(np.concatenate(parts).astype(np.int64))[None] for name, parts in arrays.items()}
    lengths = [len(row.ids) for row in rows]
    ends, longest = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)), max(lengths)
    return batch | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}  # type: ignore[dict-item]


def pad(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Pad on the right: `input_ids`, `attention_mask`, `labels`, each (B rows, T of the longest), int64.

    `position_ids` are given where a row has its own.
    """
    import numpy as np
    import torch

    longest = max(len(row.ids) for row in rows)
    ids_BT = np.zeros((len(rows), longest), np.int64)
    mask_BT, labels_BT = np.zeros_like(ids_BT), np.full_like(ids_BT, IGNORED)
    positions_BT = np.tile(np.arange(longest), (len(rows), 1))
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids_BT[place, :length] = row.ids
        labels_BT[place, :length] = row.labels
        mask_BT[place, :length] = 1
        if row.positions is not None:
            positions_BT[place, :length] = row.positions
    arrays = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    if any(row.positions is not None for row in rows):
        arrays["position_ids"] = positions_BT
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
