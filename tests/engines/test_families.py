"""Models of many kinds answer in a batch as they do alone; those whose layers keep more than keys and values do so side by side."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import build_tokenizer
from finery.engines.base import Ask, GenerationOptions
from finery.engines.huggingface import HuggingFace
from finery.models.kernels import native

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "mamba": {"state_size": 4, "hidden_size": 32, "intermediate_size": 64},
    "qwen3_next": {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip
WAYS = {"mamba": "anew", "qwen3_next": "side by side"}
NATIVE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3")
"""Those that have a step in C."""


@pytest.mark.parametrize("kind", KINDS)
def test_together_as_alone(kind: str, tmp_path: Path) -> None:
    """Prompts beyond the sliding windows, and answers that end at different times."""
    build_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    config = AutoConfig.for_model(kind, **(SIZES | KINDS[kind] | {"vocab_size": len(tokenizer)}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    engine = HuggingFace(model, tokenizer, frozenset(), HuggingFace.Options.model_validate({}))
    assert engine.batch.way == WAYS.get(kind, "together")
    assert (engine.batch.native is not None) == (kind in NATIVE and native.serves(torch.zeros(1)))
    texts = ["The quick brown fox jumps over the lazy dog. " * 2, "fox", "Who are you?", "你是谁？我是"]
    greedy = [GenerationOptions.model_validate({"do_sample": False, "max_new_tokens": size}) for size in (24, 5, 14, 20)]
    asks = [Ask(tokenizer(text)["input_ids"], chosen) for text, chosen in zip(texts, greedy, strict=True)]
    streams = [engine.begin(one) for one in asks]
    together = [[token.id for piece in stream for token in piece.tokens] for stream in streams]
    for one, ids in zip(asks, together, strict=True):
        with torch.no_grad():
            wanted = model.generate(
                torch.tensor([one.prompt_ids]), do_sample=False, max_new_tokens=one.options.max_new_tokens, eos_token_id=[], pad_token_id=0
            )
        assert ids == wanted[0, len(one.prompt_ids) :].tolist()
    engine.close()
