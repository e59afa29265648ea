"""GaLore (Zhao et al., 2024, arXiv 2403.03507): linear layers are stepped by the few directions in which their gradients point most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finery.compat import need
from finery.errors import UserError
from finery.options import CommaList, OptionGroup
from finery.training.low_rank import LowRank
from finery.training.optimizers.base import ADAMW, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Galore"]

EIGHT_BITS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")


class Galore(LowRank):
    """The optimizer that `optim` names, of galore-torch: its state holds projected gradients, which take a part of the memory."""

    switch = "use_galore"
    word = "galore"
    package = "galore_torch"
    takes = (*ADAMW, "adafactor", *EIGHT_BITS)

    class Options(OptionGroup):
        use_galore: bool = False
        """Train all weights with projected gradients (GaLore)."""
        galore_target: CommaList = ("all",)
        """Parts of the names of linear layers to project, or all of them."""
        galore_rank: int = Field(16, gt=0)
        """Directions that a gradient is projected to."""
        galore_update_interval: int = Field(200, gt=0)
        """Steps after which the directions are found anew."""
        galore_scale: float = Field(2.0, gt=0)
        """Factor of the projected step."""
        galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
        """Which side of a gradient is projected: std the shorter one, reverse_std the longer one, or always right, left, or both (full)."""
        galore_layerwise: bool = False
        """Step each weight as soon as its gradient is there, so that gradients need no memory; max_grad_norm has no effect then."""

    options: Options

    def kind(self, setting: Setting) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """AdamW, Adafactor without schedules of its own, or AdamW with a state of 8 bits."""
        galore = need(self.package)
        if setting.name == "adafactor":
            return galore.GaLoreAdafactor, {"lr": setting.arguments["lr"], "scale_parameter": False, "relative_step": False}
        shared = {name: setting.arguments[name] for name in ("lr", "betas", "eps")}
        if setting.name in EIGHT_BITS:
            # bitsandbytes reads these two as max_unorm and skip_zeros today: neither is wanted
            paged = setting.arguments.get("is_paged", False)
            return galore.GaLoreAdamW8bit, shared | {"percentile_clipping": 0.0, "block_wise": False, "is_paged": paged}
        return galore.GaLoreAdamW, shared | {"no_deprecation_warning": True}

    @property
    def projection(self) -> dict[str, Any]:
        """Named as in the package."""
        given = self.options
        return {
            "rank": given.galore_rank,
            "update_proj_gap": given.galore_update_interval,
            "scale": given.galore_scale,
            "proj_type": given.galore_proj_type,
        }

    def projector(self, group: Mapping[str, Any]) -> Any:
        """As the package makes it at the first step."""
        from galore_torch.galore_projector import GaLoreProjector

        return GaLoreProjector(group["rank"], **{name: group[name] for name in ("update_proj_gap", "scale", "proj_type")})

    def refusal(self, shape: Sequence[int]) -> str:
        """The package takes the other side of a wide matrix where nothing is left out of it."""
        if self.options.galore_proj_type == "reverse_std" and shape[0] < shape[1] and self.options.galore_rank >= shape[0]:
            return f"'galore_proj_type: reverse_std' needs a lower 'galore_rank' than {self.options.galore_rank}"
        return ""

    def build(self, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        """The package's 8 bits wait for CUDA after each weight."""
        if setting.name in EIGHT_BITS and any(weight.device.type != "cuda" for weight in model.parameters()):
            raise UserError(f"'use_galore' with 'optim: {setting.name}' needs a GPU; adamw_torch and adafactor serve here as well")
        return super().build(model, setting)
