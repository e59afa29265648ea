"""bitsandbytes: 4 bits (NF4 or FP4, Dettmers et al., 2023, arXiv 2305.14314) and 8 bits (LLM.int8(), 2022, arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from finery.models.quantizers.base import Quantizer
from finery.options import OptionGroup

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["BitsAndBytes"]

BLOCK = 64
"""Weights that share a scale in 4 bits."""


class BitsAndBytes(Quantizer):
    """On GPUs and CPUs. In 8 bits inputs are rounded as well, so that such layers are left to bitsandbytes' own products."""

    bits = (4, 8)
    checkpoints = ("bitsandbytes",)
    package = "bitsandbytes"

    class Options(OptionGroup):
        quantization_type: Literal["nf4", "fp4"] = "nf4"
        """The 16 values of 4 bits: spread as normally distributed weights are (nf4), or floating-point numbers (fp4)."""
        double_quantization: bool = True
        """Hold the scales of 4 bits in 8 bits as well."""

    options: Options

    def arguments(self, bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """What is stored is told in the format of products, which FSDP needs."""
        from transformers import BitsAndBytesConfig

        if bits == 8:
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        four = {
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_use_double_quant": self.options.double_quantization,
            "bnb_4bit_quant_type": self.options.quantization_type,
            # FSDP gathers weights of one format; on a CPU bytes are what the packed numbers are
            **({"bnb_4bit_quant_storage": dtype} if device.type == "cuda" else {}),
        }
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four)}

    def finish(self, model: Any, bits: int | None, dtype: torch.dtype, device: torch.device) -> Any:
        """Keeps weights as they are packed.

        bitsandbytes 0.50.2 repacks them on CPUs with AVX512-bf16 in the first pass without gradients, and unpacks them wrongly where scales
        are plain: a model that was evaluated once is then spoilt, in memory and in what is saved.
        """
        for layer in model.modules():
            if "support_avx512bf16_for_cpu" in layer.__dict__:
                layer.support_avx512bf16_for_cpu = False
        return model

    def holds(self, layer: nn.Module) -> bool:
        """Both kinds of layers."""
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

        return isinstance(layer, (Linear4bit, Linear8bitLt))

    def is_exact(self, layer: nn.Module) -> bool:
        """Four bits are widened before the product; eight are multiplied as they are, with rounded inputs."""
        from bitsandbytes.nn.modules import Linear4bit

        return isinstance(layer, Linear4bit)

    def plain_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """Widened, in `dtype`."""
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

        if self.is_exact(layer):
            return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return int8_vectorwise_dequant(layer.weight.data, scales).to(dtype)

    def shows_lengths(self, bits: int) -> bool:
        """peft 0.21 looks for the scales of 8 bits where bitsandbytes 0.50 does not keep them on a CPU."""
        import torch

        return bits != 8 or torch.cuda.is_available()

    def tensors(self, layer: Any) -> Iterator[Tensor]:
        """Packed numbers and scales, and the scales of scales."""
        yield layer.weight.data
        if not self.is_exact(layer):
            yield layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            return
        state = layer.weight.quant_state
        yield state.absmax
        if state.nested:
            yield state.state2.absmax

    def bits_each(self, bits: int, dtype: torch.dtype) -> float:
        """Scales are fp32, one for 64 weights; where they are held in 8 bits, 256 of them share one in fp32."""
        if bits == 8:
            return 8.0
        return 4 + (8 + 32 / 256 if self.options.double_quantization else 32) / BLOCK
