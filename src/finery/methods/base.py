"""What a training method is: the rows it reads, the head it trains, and its loss.

Shapes: B rows, T tokens, V vocabulary, S supervised tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from finery.data.rows.base import Row
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """A sum, to be divided by a whole step's weight, so that no cut of the step changes the gradient."""

    total: Tensor  # ()
    weight: Tensor  # () how many tokens (or pairs) the sum is over


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    """Sum of -log p over supervised tokens, each predicted from those before it, in fp32; see `finery.models.head`."""
    labels_BT = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return Loss(model(**inputs, targets=labels_BT), (labels_BT[:, 1:] >= 0).sum())


class Method(ABC):
    """A training method. The flags say what a run must prepare for it."""

    rows: str  # the kind of rows, a name in data/rows
    ranking = False  # learns from pairs: `ranking: true` in dataset_info.json
    reads: Collection[str] = ()  # columns beside question and answer, such as images; others are refused, not passed over
    plots: Sequence[str] = ("loss", "eval_loss")  # what plot_loss draws

    Options: ClassVar[type[OptionGroup]] = OptionGroup  # no keys, unless a subclass has some

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def weight(self, rows: Sequence[Row]) -> int:
        """What the losses of these rows will weigh together."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """The loss of one micro-batch; `model` is called through the trainer's wrapper, and has learnt of `finery.models.head.teach`."""

    def check(self, run: Any) -> Iterator[Finding]:
        """What does not fit together with other keys."""
        yield from ()
