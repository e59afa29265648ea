"""Full fine-tuning: every weight is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finery.models.adapters.base import Adapter
from finery.models.composite import open_parts

__all__ = ["Full"]


class Full(Adapter):
    """Nothing is frozen but parts of composite models."""

    def apply(self, model: Any, folders: Sequence[Path] = (), new_tokens: range = range(0)) -> Any:
        """All weights are trained, new tokens' rows among them, but for parts that are frozen."""
        parts = open_parts(model, self.shared)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parts.is_open(name))
        return model
