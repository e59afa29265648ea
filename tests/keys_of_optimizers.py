"""Cases of the optimizers' keys: what each does to the weights. `test_every_key.py` runs them."""

from collections.abc import Callable
from typing import Any

import pytest

from conftest import build_model
from watched import Bench, Case, Outcome, losses, says

FULL = {"finetuning_type": "full", "max_steps": 3, "learning_rate": 0.01}
GALORE = FULL | {"use_galore": True, "galore_rank": 4}
APOLLO = FULL | {"use_apollo": True, "apollo_rank": 4}
BADAM = FULL | {"use_badam": True}
SHARE = BADAM | {"badam_mode": "ratio"}
TENSOR = APOLLO | {"apollo_scale_type": "tensor"}
"""Every side of a gradient can be projected then."""


def model_sum(run: Outcome) -> float:
    return sum(float(tensor.double().abs().sum()) for tensor in run.weights("model.safetensors").values())


def clipped_at(run: Outcome) -> float:
    return run.trainer.args.max_grad_norm


def trained_layers(run: Outcome) -> set[str]:
    """Those that the optimizer has left to be trained at the end."""
    return {name.split(".")[2] for name, weight in run.trainer.model.named_parameters() if weight.requires_grad}


def moves(value: Any, base: dict[str, Any]) -> Case:
    """The weights end elsewhere."""
    return Case(value, model_sum, None, base)


TRAINED: dict[str, Case] = {
    "loraplus_lr_ratio": Case(16, losses, None, {"max_steps": 3}),
    "use_galore": moves(True, FULL),
    "galore_target": moves("q_proj", GALORE),
    "galore_rank": moves(2, GALORE),
    "galore_update_interval": moves(1, GALORE),
    "galore_scale": moves(1.0, GALORE),
    "galore_proj_type": moves("reverse_std", GALORE),
    "galore_layerwise": Case(True, clipped_at, (1.0, 0.0), GALORE),
    "use_apollo": moves(True, FULL),
    "apollo_target": moves("q_proj", APOLLO),
    "apollo_rank": moves(2, APOLLO),
    "apollo_update_interval": moves(1, APOLLO),
    "apollo_scale": moves(1.0, APOLLO),
    "apollo_proj": moves("svd", APOLLO),
    "apollo_proj_type": moves("right", TENSOR),
    "apollo_scale_type": moves("tensor", APOLLO),
    "apollo_layerwise": Case(True, clipped_at, (1.0, 0.0), APOLLO),
    "apollo_scale_front": moves(True, APOLLO),
    "use_badam": moves(True, FULL),
    "badam_mode": moves("ratio", BADAM),
    "badam_start_block": Case(1, trained_layers, ({"0"}, {"1"}), BADAM),
    "badam_switch_mode": Case("descending", trained_layers, ({"0"}, {"1"}), BADAM),
    "badam_switch_interval": Case(3, trained_layers, ({"0"}, {"1"}), BADAM),
    "badam_update_ratio": moves(0.5, SHARE),
    "badam_mask_mode": moves("scatter", SHARE),
    "badam_verbose": Case(1, says("BAdam: "), (False, True), BADAM),
    "use_adam_mini": moves(True, FULL),
    "use_muon": moves(True, FULL),
}


def loraplus_lr_embedding(bench: Bench) -> None:
    """`lora_target` names linear layers; an adapter that was made elsewhere may have one on its embeddings."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    wanted = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    untied = str(build_model(bench.tmp_path / "untied", tie_word_embeddings=False))
    get_peft_model(AutoModelForCausalLM.from_pretrained(untied), wanted).save_pretrained(
        str(bench.tmp_path / "made"), save_embedding_layers=False
    )
    base = {"model_name_or_path": untied, "adapter_name_or_path": str(bench.tmp_path / "made"), "loraplus_lr_ratio": 4}
    slow, fast = (
        {name: tensor.abs().sum() for name, tensor in bench.train(**base, **more).weights().items() if "embedding_B" in name}
        for more in ({}, {"loraplus_lr_embedding": 0.01})
    )
    assert slow.keys() == fast.keys() != set()
    assert all(float(fast[name] - slow[name]) != pytest.approx(0, abs=1e-4) for name in slow)


OTHERS: dict[str, Callable[[Bench], None]] = {"loraplus_lr_embedding": loraplus_lr_embedding}
