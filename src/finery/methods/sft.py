"""Supervised fine-tuning: cross entropy on the answers' tokens, or one of its relatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finery.methods.base import TokenMethod
from finery.options import Finding, OptionGroup

if TYPE_CHECKING:
    from finery.models.head import TokenLoss

__all__ = ["SFT"]


class SFT(TokenMethod):
    """Learns to give the answers of a data set."""

    rows = "chat"

    class Options(OptionGroup):
        use_dft_loss: bool = False
        """Weigh each token by its own probability (DFT): unlikely ones move the model less. Evaluation keeps to plain cross entropy."""
        use_eaft_loss: bool = False
        """Weigh each token by how unsure the model is (EAFT). Evaluation keeps to plain cross entropy."""
        eaft_alpha: float = Field(1.0, ge=0)
        """Exponent of EAFT's weight, which is the entropy of the 20 likeliest tokens, divided by 3."""
        use_asft_loss: bool = False
        """DFT, held to the model that training began with (ASFT); its trained weights are kept. Evaluation keeps to plain cross entropy."""
        asft_alpha: float = Field(0.1, ge=0)
        """How strong ASFT's hold is: it multiplies the mean divergence KL(start || model) over tokens."""
        compute_accuracy: bool = False
        """Measure in evaluations how many of a row's learnt tokens are the likeliest, the mean over rows: eval_accuracy."""

    options: Options

    @property
    def needs_reference(self) -> bool:
        """ASFT measures against the start."""
        return self.options.use_asft_loss

    @property
    def token_loss(self) -> TokenLoss | None:
        """The one that a key switches on."""
        from finery.methods.functions.token_losses import asft, dft, eaft

        if self.options.use_dft_loss:
            return dft
        if self.options.use_eaft_loss:
            return eaft(self.options.eaft_alpha)
        return asft(self.options.asft_alpha) if self.options.use_asft_loss else super().token_loss

    @property
    def measures_accuracy(self) -> bool:  # type: ignore[override]
        """Where it is asked for."""
        return self.options.compute_accuracy

    def check(self, run: Any) -> Iterator[Finding]:
        """One loss at a time; a strength belongs to its loss."""
        on = [key for key in ("use_dft_loss", "use_eaft_loss", "use_asft_loss") if getattr(self.options, key)]
        on += ["label_smoothing_factor"] if self.learning.label_smoothing_factor else []
        if len(on) > 1:
            yield Finding(on[0], f"and {', '.join(map(repr, on[1:]))} exclude each other: keep one")
        for strength, switch in (("eaft_alpha", "use_eaft_loss"), ("asft_alpha", "use_asft_loss")):
            if strength in run.written and not getattr(self.options, switch):
                yield Finding(strength, f"has no effect without {switch!r}", fatal=False)
