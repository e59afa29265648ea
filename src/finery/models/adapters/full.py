"""Full fine-tuning: every weight is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finery.models.adapters.base import Adapter

__all__ = ["Full"]


class Full(Adapter):
    """Nothing is frozen."""

    def apply(self, model: Any, folders: Sequence[Path] = (), new_tokens: range = range(0)) -> Any:
        """All weights are trained, new tokens' rows among them."""
        return model.requires_grad_(True)
