"""Cases of the keys that shape the loss, the positions and the number formats. `test_every_key.py` runs them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import build_model, build_tokenizer
from watched import Bench, Case, Outcome, has, losses, says

FAR = {"use_asft_loss": True, "learning_rate": 0.05, "max_steps": 3}
"""Far enough from the start for its hold to be felt."""


def build_experts(folder: Path, **changes: Any) -> Path:
    """A random mixture of four experts, two layers."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    build_tokenizer(folder)
    size = len(AutoTokenizer.from_pretrained(str(folder)))
    settings: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**{**settings, **changes})).save_pretrained(str(folder))
    return folder


def recomputation(run: Outcome) -> Any:
    return run.trainer.args.activation_checkpointing_kwargs


def moe_aux_loss_coef(bench: Bench) -> None:
    base = {"model_name_or_path": str(build_experts(bench.tmp_path / "experts", num_hidden_layers=3)), "finetuning_type": "full"}
    plain, balanced = bench.train(**base), bench.train(**base, moe_aux_loss_coef=0.5)
    recomputed = bench.train(**base, moe_aux_loss_coef=0.5, gradient_checkpointing=True)
    assert losses(recomputed) == pytest.approx(losses(balanced), rel=1e-6)
    model = balanced.trainer.model
    assert len(model(input_ids=model.dummy_inputs["input_ids"], output_router_logits=True).router_logits) == 3
    assert losses(balanced)[0] - losses(plain)[0] == pytest.approx(0.5 * 2, abs=0.15)  # nearly even: the number of experts of a token
    assert "has no router" in bench.once(moe_aux_loss_coef=0.5).said


def rope_scaling(bench: Bench) -> None:
    short = {"model_name_or_path": str(build_model(bench.tmp_path / "short", max_position_embeddings=32))}
    plain, scaled = bench.train(**short), bench.train(**short, rope_scaling="yarn")
    assert losses(plain) != losses(scaled)
    assert json.loads((scaled.folder / "rope.json").read_text())["rope_parameters"]["factor"] == 4.0  # 128 / 32
    assert "fits into the 512 positions" in bench.once(rope_scaling="yarn").said


def fp8_backend(bench: Bench) -> None:
    from finery.training import fp8

    kinds = []
    bench.patch.setattr(fp8, "have", lambda package: True)
    bench.patch.setattr("accelerate.utils.dataclasses.is_transformer_engine_available", lambda: True)
    for word in ("auto", "torchao", "te", "msamp"):
        kinds.append(type(fp8.recipe(fp8.Fp8Options(fp8=True, fp8_backend=word))).__name__)
    assert kinds == ["AORecipeKwargs", "AORecipeKwargs", "TERecipeKwargs", "MSAMPRecipeKwargs"]
    assert "has no effect without 'fp8'" in bench.once(fp8_backend="te").said


def fp8_enable_fsdp_float8_all_gather(bench: Bench) -> None:
    from finery.training.fp8 import Fp8Options, recipe

    for value in (False, True):
        found = recipe(Fp8Options(fp8=True, fp8_backend="torchao", fp8_enable_fsdp_float8_all_gather=value))
        assert found.config.enable_fsdp_float8_all_gather is value


TRAINED: dict[str, Case] = {
    "use_dft_loss": Case(True, losses),
    "use_eaft_loss": Case(True, losses),
    "eaft_alpha": Case(2.0, losses, None, {"use_eaft_loss": True}),
    "use_asft_loss": Case(True, losses),
    "asft_alpha": Case(5.0, losses, None, FAR),
    "label_smoothing_factor": Case(0.2, losses),
    "neftune_noise_alpha": Case(5.0, losses),
    "loss_ledger": Case(True, has("loss_ledger"), (False, True)),
    "train_from_scratch": Case(True, losses, None, {"finetuning_type": "full"}),
    "use_reentrant_gc": Case(True, recomputation, (None, {"use_reentrant": True})),
    "print_param_status": Case(True, says("model.norm.weight: 32, float32, cpu, frozen"), (False, True)),
    "fp8": Case(True, says("'fp8' needs a GPU with compute capability 8.9 or more"), (False, True)),
}
OTHERS: dict[str, Callable[[Bench], None]] = {
    case.__name__: case for case in (moe_aux_loss_coef, rope_scaling, fp8_backend, fp8_enable_fsdp_float8_all_gather)
}
