"""Noise on the embeddings in training (NEFTune: Jain et al., 2023, arXiv 2310.05914)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finery.models.head import row_lengths

if TYPE_CHECKING:
    from torch import Tensor, nn


def add_noise(model: Any, alpha: float | None) -> None:
    """Each number of an embedding gets uniform noise of at most alpha / √(L·d), L the length of its own row and d the width.

    A row's noise is thus the same whether it lies alone, beside others that are longer, or end to end with them. None in evaluation.
    """
    if not alpha:
        return

    def noisy(module: nn.Module, inputs: Any, embedded_BTH: Tensor) -> Tensor:
        import torch

        if not module.training:
            return embedded_BTH
        batch, tokens, width = embedded_BTH.shape
        limits_BT = alpha / (row_lengths(batch, tokens, embedded_BTH.device) * width).sqrt()
        noise = torch.rand_like(embedded_BTH, dtype=torch.float32) * 2 - 1
        return embedded_BTH + (noise * limits_BT[..., None]).to(embedded_BTH.dtype)

    model.get_input_embeddings().register_forward_hook(noisy)
