"""OFT: rotations of the weights' inputs, block by block."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from finery.models.composite import Parts
from finery.models.peft_adapter import PeftAdapter, any_transposed, targets
from finery.options import CommaList, Finding, OptionGroup

__all__ = ["OFT"]


class OFT(PeftAdapter):
    """Orthogonal fine-tuning (Qiu et al., 2023, arXiv 2306.07280): W·R with R a block-diagonal rotation."""

    shown = {"oft_rank": "r", "oft_block_size": "oft_block_size", "module_dropout": "module_dropout", "oft_target": "target_modules"}

    class Options(OptionGroup):
        oft_rank: int = Field(0, ge=0)
        """Number of blocks in a layer; 0: it follows from the block size."""
        oft_block_size: int = Field(32, ge=0)
        """Size of a block; not used where oft_rank is given."""
        oft_target: CommaList = Field(("all",), min_length=1)
        """Which linear layers are rotated: names, or one regular expression for whole paths; all of them but the head by default."""
        module_dropout: float = Field(0.0, ge=0, lt=1)
        """How often a block is left out in training. Said to have no effect: peft 0.21 builds it and does not apply it."""

    options: Options

    def check(self, run: Any) -> Iterator[Finding]:
        """peft 0.21.2 makes a dropout of every rotation and never calls it."""
        yield from super().check(run)
        if self.options.module_dropout:
            yield Finding("module_dropout", "has no effect: peft 0.21 builds OFT's dropout and does not apply it", fatal=False)

    def config(self, model: Any, parts: Parts, new_tokens: range) -> Any:
        """As the keys say; new tokens' rows are no rotations, and are trained where `additional_target` names their modules."""
        from peft import OFTConfig

        options = self.options
        chosen = targets(model, "oft_target", options.oft_target, parts)
        return OFTConfig(
            r=options.oft_rank,
            oft_block_size=0 if options.oft_rank else options.oft_block_size,
            module_dropout=options.module_dropout,
            target_modules=chosen,
            fan_in_fan_out=any_transposed(model, chosen),
            modules_to_save=self.additional(model, parts) or None,
            task_type="CAUSAL_LM",
        )
