"""What a training method is: the rows it reads, the head it trains, and its loss.

Shapes: B rows, T tokens, V vocabulary, S supervised tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from finery.data.rows.base import Row
from finery.models.head import bare
from finery.models.noise import add_noise
from finery.models.routers import weigh_routers
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finery.models.head import TokenLoss


class LearningOptions(OptionGroup):
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """This share of what a token costs is the mean over the whole vocabulary. Evaluation keeps to plain cross entropy."""
    neftune_noise_alpha: float | None = Field(None, ge=0)
    """Noise on the embeddings in training (NEFTune), at most so much / sqrt(length of the row x width)."""
    moe_aux_loss_coef: float | None = Field(None, ge=0)
    """Weight of the loss that balances the routers of a mixture of experts, of each micro-batch; none where it is not given."""

    def check(self, run: Any) -> Iterator[Finding]:
        """What the method, and recomputation, must be able to do."""
        if self.label_smoothing_factor and not run.method.learns_tokens:
            yield Finding("label_smoothing_factor", f"has no effect in 'stage: {run.choices.stage}'", fatal=False)
        if self.moe_aux_loss_coef and run.model.use_reentrant_gc:
            yield Finding("moe_aux_loss_coef", "would not reach the routers with 'use_reentrant_gc': leave one out")


@dataclass(frozen=True)
class Loss:
    """A sum, to be divided by a whole step's weight, so that no cut of the step changes the gradient."""

    total: Tensor  # ()
    weight: Tensor  # () how many tokens (or pairs) the sum is over


def next_token_loss(model: nn.Module, batch: dict[str, Tensor], token_loss: TokenLoss | None = None) -> Loss:
    """Sum of -log p over supervised tokens, each predicted from those before it, in fp32; see `finery.models.head`.

    Or the sum that `token_loss` makes of their scores; the batch then holds a reference's scores as `reference`, if it needs them.
    """
    labels_BT = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    more = {} if token_loss is None else {"token_loss": token_loss}
    return Loss(model(**inputs, **more, targets=labels_BT), (labels_BT[:, 1:] >= 0).sum())


class Method(ABC):
    """A training method. The flags say what a run must prepare for it."""

    rows: str  # the kind of rows, a name in data/rows
    ranking = False  # learns from pairs: `ranking: true` in dataset_info.json
    reads: Collection[str] = ()  # columns beside question and answer, such as images; others are refused, not passed over
    plots: Sequence[str] = ("loss", "eval_loss")  # what plot_loss draws
    learns_tokens = False  # its loss is a cross entropy on tokens, which can be smoothed
    measures_accuracy = False  # an evaluation counts how many tokens are guessed right, too

    Options: ClassVar[type[OptionGroup]] = OptionGroup  # no keys, unless a subclass has some

    def __init__(self, options: Any, learning: LearningOptions | None = None) -> None:
        self.options = options
        self.learning = learning or LearningOptions.model_validate({})

    @property
    def needs_reference(self) -> bool:
        """Whether batches in training must hold what the model gave before its first step, as `reference`."""
        return False

    def attach(self, model: Any) -> None:
        """Put in place what training adds to the model's own forward; nothing of it is saved, or there in evaluation."""
        add_noise(bare(model), self.learning.neftune_noise_alpha)
        weigh_routers(bare(model), self.learning.moe_aux_loss_coef)

    @abstractmethod
    def weight(self, rows: Sequence[Row]) -> int:
        """What the losses of these rows will weigh together."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """The loss of one micro-batch; `model` is called through the trainer's wrapper, and has learnt of `finery.models.head.teach`."""

    def check(self, run: Any) -> Iterator[Finding]:
        """What does not fit together with other keys."""
        yield from ()


class TokenMethod(Method):
    """A method whose loss is a sum over supervised tokens."""

    learns_tokens = True

    @property
    def token_loss(self) -> TokenLoss | None:
        """What a token costs in training, where that is not plain cross entropy."""
        from finery.methods.functions.token_losses import smoothed

        return smoothed(self.learning.label_smoothing_factor) if self.learning.label_smoothing_factor else None

    def weight(self, rows: Sequence[Row]) -> int:
        """Supervised tokens."""
        return sum(row.num_supervised for row in rows)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """In evaluation plain cross entropy, so that losses of all kinds of training can be compared."""
        from finery.methods.functions.guesses import counting

        return next_token_loss(model, batch, self.token_loss if model.training else counting())
