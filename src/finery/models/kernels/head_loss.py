"""The output head and its cross entropy on supervised tokens only, in chunks: memory grows with a chunk, not with the tokens."""

from functools import partial
from typing import Any

from finery.models.kernels.base import Kernel, Patches
from finery.options import OptionGroup

__all__ = ["HeadLoss"]


class HeadLoss(Kernel):
    """Serves models whose logits are a linear layer of the last hidden states, scaled or capped."""

    switch = "head_loss"

    class Options(OptionGroup):
        head_loss: bool = True
        """Compute the output head for supervised tokens only and never all logits at once."""

    def fits(self, model: Any) -> str:
        """Tried on a few random tokens against the model's own logits."""
        from finery.models.kernels.functions.head_loss import difference

        return difference(model)

    def apply(self, model: Any, patches: Patches) -> int:
        """The model's forward gives the loss where it is asked with targets."""
        from finery.models.head import with_loss
        from finery.models.kernels.functions.head_loss import Shape, chunked_loss, chunked_scores

        shape = Shape(model.config)
        patches.forward(model, with_loss(model, partial(chunked_loss, shape), partial(chunked_scores, shape)))
        return 1
