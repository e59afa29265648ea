"""Tiny random models that see: a language model of two layers, a tower of three and a projector."""

from pathlib import Path
from typing import Any

from conftest import build_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_VISION = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3}
MARKS = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}


def settings(kind: str, size: int) -> dict[str, Any]:
    """The config of a model of this kind, for so many tokens."""
    text = TEXT | {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gemma3":
        window = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
        return {"text_config": text | window, "vision_config": SIGLIP, "mm_tokens_per_image": 1, "image_token_index": 300}
    if kind == "llava":
        tower = SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 32}
        return {"text_config": text | {"model_type": "llama"}, "vision_config": tower, "image_token_index": 300}
    if kind == "qwen2_vl":
        tower = QWEN_VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return {"text_config": text | {"rope_parameters": MROPE}, "vision_config": tower, **MARKS}
    if kind == "qwen2_5_vl":
        tower = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [2]}
        return {"text_config": text | {"rope_parameters": MROPE}, "vision_config": QWEN_VISION | tower, **MARKS}
    if kind == "qwen3_vl":
        tower = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 16}
        more = {"deepstack_visual_indexes": [0, 1]}
        rope = MROPE | {"mrope_interleaved": True}
        return {"text_config": text | {"rope_parameters": rope}, "vision_config": QWEN_VISION | tower | more, **MARKS}
    raise ValueError(kind)


def build(folder: Path, kind: str, **changes: Any) -> Path:
    """A model of this kind with the tests' tokenizer; the same weights every time."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    build_tokenizer(folder)
    config = AutoConfig.for_model(kind, **(settings(kind, len(AutoTokenizer.from_pretrained(str(folder)))) | changes))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(str(folder))
    return folder
