"""What a kind of row is: it encodes samples and collates rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finery.data.sample import Sample
from finery.data.template import Template

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

IGNORED = -100
"""A label that the loss does not see."""


@dataclass(frozen=True)
class Row:
    """Token ids and labels of one row, T each, int32; a label is the id at its own place, or `IGNORED`."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    @property
    def num_supervised(self) -> int:
        """Tokens that the loss counts: the first token of a row is never predicted."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Encoded:
    """What a sample became: rows, or none and the reason; and how many tokens were cut away."""

    rows: tuple[Row, ...]
    reason: str = ""
    num_cut: int = 0


class Rows(ABC):
    """Encodes one sample, collates many rows."""

    def __init__(self, template: Template, cutoff_len: int) -> None:
        self.template = template
        self.cutoff_len = cutoff_len

    @abstractmethod
    def encode(self, sample: Sample) -> Encoded:
        """All rows that a sample yields; never raises for what is in the sample."""

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """A batch that the method's loss reads."""
