"""APOLLO (Zhu et al., 2024, arXiv 2412.05270): gradients are scaled as a projection of them to few dimensions tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finery.compat import need
from finery.options import CommaList, OptionGroup
from finery.training.low_rank import LowRank
from finery.training.optimizers.base import ADAMW, Setting

if TYPE_CHECKING:
    import torch

__all__ = ["Apollo"]


class Apollo(LowRank):
    """AdamW of apollo-torch: its state holds projected gradients, which take a part of the memory."""

    switch = "use_apollo"
    word = "apollo"
    package = "apollo_torch"
    takes = ADAMW

    class Options(OptionGroup):
        use_apollo: bool = False
        """Train all weights with gradients scaled by what their projections tell (APOLLO)."""
        apollo_target: CommaList = ("all",)
        """Parts of the names of linear layers to scale so, or all of them."""
        apollo_rank: int = Field(16, gt=0)
        """Dimensions that a gradient is projected to."""
        apollo_update_interval: int = Field(200, gt=0)
        """Steps after which the projection is drawn anew."""
        apollo_scale: float = Field(32.0, gt=0)
        """The step is longer by the square root of this."""
        apollo_proj: Literal["svd", "random"] = "random"
        """What is projected to: random directions, or those in which the gradient points most."""
        apollo_proj_type: Literal["std", "right", "left"] = "std"
        """Which side of a gradient is projected: the shorter one (std), or always right or left."""
        apollo_scale_type: Literal["channel", "tensor"] = "channel"
        """One factor for each row or column (channel), or one for each weight matrix (tensor)."""
        apollo_layerwise: bool = False
        """Step each weight as soon as its gradient is there, so that gradients need no memory; max_grad_norm has no effect then."""
        apollo_scale_front: bool = False
        """Scale before the growth of the step is limited, not after."""

    options: Options

    def kind(self, setting: Setting) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """AdamW, with its own limit to how fast steps grow."""
        shared = {name: setting.arguments[name] for name in ("lr", "betas", "eps")}
        return need(self.package).APOLLOAdamW, shared | {"scale_front": self.options.apollo_scale_front}

    @property
    def projection(self) -> dict[str, Any]:
        """Named as in the package."""
        given = self.options
        return {
            "rank": given.apollo_rank,
            "proj": given.apollo_proj,
            "scale_type": given.apollo_scale_type,
            "update_proj_gap": given.apollo_update_interval,
            "scale": given.apollo_scale,
            "proj_type": given.apollo_proj_type,
        }

    def projector(self, group: Mapping[str, Any]) -> Any:
        """As the package makes it at the first step; the seed comes with what was kept."""
        from apollo_torch.random_projector import GradientProjector
        from apollo_torch.svd_projector import GaLoreProjector

        kind = GradientProjector if group["proj"] == "random" else GaLoreProjector
        return kind(group["rank"], **{name: group[name] for name in ("update_proj_gap", "scale", "proj_type")})

    def refusal(self, shape: Sequence[int]) -> str:
        """A factor for each channel is one for each row of a tall matrix and each column of a wide one."""
        given = self.options
        is_other = given.apollo_proj_type == ("left" if shape[0] >= shape[1] else "right")
        if given.apollo_scale_type == "channel" and is_other:
            return f"'apollo_proj_type: {given.apollo_proj_type}' needs 'apollo_scale_type: tensor' for a matrix of such a shape"
        return ""
