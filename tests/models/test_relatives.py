"""LoRA's relatives: where each starts, that it trains, goes on exactly, comes back and merges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import build_model
from finery.commands.chat import open_engine
from finery.commands.export import export
from finery.commands.train import train
from finery.errors import UserError
from finery.models.adapters import ADAPTERS
from finery.models.load import load_model
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
IDS = torch.tensor([[5, 9, 40, 77, 3, 120]])
RUNS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "lora_rank": 4},
    "dora": {"use_dora": True},
    "patterns": {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"v_proj": 3}},
    "pissa": {"pissa_init": True, "lora_rank": 4},
    "pissa, exact": {
        "pissa_init": True,
        "pissa_iter": -1,
        "use_rslora": True,
        "lora_rank_pattern": {"q_proj": 2},
        "lora_alpha_pattern": {"v_proj": 3},
    },
    "oft": {"finetuning_type": "oft", "oft_block_size": 8},
    **{
        kind: {"finetuning_type": "peft", "peft_type": kind, "peft_config": config}
        for kind, config in {
            "vera": {},
            "ia3": {},
            "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1},
            "boft": {"boft_block_size": 4},
            "loha": {"r": 4},
            "lokr": {"r": 4},
            "hra": {"r": 4},
        }.items()
    },
}

ONE_SITTING = {"adalora"}
"""A checkpoint holds the ranks that are left, and no longer fits an adapter with all of them."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def plain(folder: Path) -> Any:
    return load_model(folder, torch.float32, False)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def scaled(keys: Keys, name: str, **changes: Any) -> dict[str, Any]:
    return keys(**{"learning_rate": 0.02, "max_steps": 4, "save_strategy": "steps", "save_steps": 2} | RUNS[name] | changes)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")  # BOFT serves without
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # AdaLoRA may leave a layer no rank at all
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # of AdaLoRA are names of weights
@pytest.mark.parametrize("name", RUNS)
def test_trains_goes_on_comes_back_and_merges(name: str, keys: Keys, tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    names = scaled(keys, name)
    folder = train(Run.from_dict(names))
    whole = losses(folder)
    assert whole[-1] < whole[0]
    if name not in ONE_SITTING:
        again = train(
            Run.from_dict({**names, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(folder / "checkpoint-2")})
        )
        assert losses(again) == pytest.approx(whole[2:], abs=2e-6)
        for key, weight in adapter(folder).items():
            assert torch.allclose(adapter(again)[key], weight, atol=1e-6), key
    wanted = logits(PeftModel.from_pretrained(plain(tiny_model), str(folder)))  # on the base as it came
    assert not torch.allclose(wanted, logits(plain(tiny_model)), atol=1e-3)
    merged = export(Run.from_dict(names))
    assert torch.allclose(logits(plain(merged)), wanted, atol=1e-5)
    engine, _ = open_engine(Run.from_dict(names))
    assert torch.allclose(logits(engine.model), wanted, atol=1e-5)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # of AdaLoRA are names of weights
def test_adalora_does_not_go_on_from_a_checkpoint_and_says_so(keys: Keys, tmp_path: Path) -> None:
    names = scaled(keys, "adalora")
    folder = train(Run.from_dict(names))
    more = {**names, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(folder / "checkpoint-2")}
    with pytest.raises(UserError, match="does not fit this run's settings"):
        train(Run.from_dict(more))


@pytest.mark.parametrize("name", ["pissa", "oft", "loha"])
def test_a_given_adapter_is_gone_on_with(name: str, keys: Keys, tiny_model: Path, tmp_path: Path) -> None:
    names = scaled(keys, name)
    first = train(Run.from_dict(names))
    more = {**names, "adapter_name_or_path": str(first), "output_dir": str(tmp_path / "more"), "max_steps": 1, "learning_rate": 0.0}
    second = train(Run.from_dict(more))
    for key, weight in adapter(first).items():
        assert torch.equal(adapter(second)[key], weight), key
    third = train(Run.from_dict({**more, "create_new_adapter": True, "output_dir": str(tmp_path / "fresh")}))
    assert losses(third)[0] == pytest.approx(losses(second)[0], abs=1e-5)


def test_run_yaml_tells_the_adapters_own_rank(keys: Keys, tmp_path: Path) -> None:
    first = train(Run.from_dict(keys(lora_rank=4, lora_alpha=5)))
    second = train(Run.from_dict(keys(adapter_name_or_path=str(first), output_dir=str(tmp_path / "more"), lora_rank=16, max_steps=1)))
    told = yaml.safe_load((second / "run.yaml").read_text())
    assert (told["lora_rank"], told["lora_alpha"]) == (4, 5)
    assert "Python said 16" in (second / "run.yaml").read_text()


# ------------------------------------------------------------------ PiSSA


def test_pissa_begins_at_the_model_with_its_main_parts(tiny_model: Path) -> None:
    part = ADAPTERS["lora"]
    made = part(part.Options(pissa_init=True, pissa_iter=-1, lora_rank=4)).apply(plain(tiny_model))
    assert torch.allclose(logits(made), logits(plain(tiny_model)), atol=1e-5)
    layer, weight = made.get_base_model().model.layers[0].mlp.up_proj, plain(tiny_model).model.layers[0].mlp.up_proj.weight
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    best = torch.linalg.svd(weight.detach())
    assert torch.allclose(layer.scaling["default"] * up @ down, best.U[:, :4] * best.S[:4] @ best.Vh[:4], atol=1e-5)


def test_pissa_converts(keys: Keys, tiny_model: Path) -> None:
    folder = train(Run.from_dict(scaled(keys, "pissa", pissa_convert=True)))
    ranks = {
        name: json.loads((folder / name / "adapter_config.json").read_text())["r"]
        for name in ("pissa_init", "pissa_backup", "pissa_converted")
    }
    assert ranks == {"pissa_init": 4, "pissa_backup": 4, "pissa_converted": 8}
    start, trained, joined = (adapter(folder / name) for name in ranks)
    key = next(key for key in joined if "lora_A" in key)
    assert torch.equal(joined[key], torch.cat([trained[key], start[key]]))
    assert joined.keys() == adapter(folder).keys() and all(torch.equal(joined[key], adapter(folder)[key]) for key in joined)


# ------------------------------------------------------------------ targets, experts, and what does not fit


def test_targets_by_a_regular_expression(tiny_model: Path) -> None:
    part = ADAPTERS["lora"]
    made = part(part.Options(lora_target=r"model\.layers\.1\..*(q|v)_proj")).apply(plain(tiny_model))
    found = {
        name.partition("base_model.model.")[2].partition(".lora_")[0] for name, weight in made.named_parameters() if weight.requires_grad
    }
    assert found == {f"model.layers.1.self_attn.{name}_proj" for name in "qv"}
    with pytest.raises(UserError, match="no linear layer's path is matched by"):
        part(part.Options(lora_target=r"layers\.9\..*")).apply(plain(tiny_model))


def test_fused_experts_are_told_and_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=2))
    part = ADAPTERS["lora"]
    part(part.Options()).apply(model)
    assert "lora_target_parameters" in capsys.readouterr().err
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=2))
    made = part(part.Options(lora_target_parameters="mlp.experts.gate_up_proj, mlp.experts.down_proj")).apply(model)
    trained = [name for name, weight in made.named_parameters() if weight.requires_grad and ".experts." in name]
    assert len(trained) == 4
    loss = made(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert any(weight.grad is not None and weight.grad.any() for name, weight in made.named_parameters() if name in trained)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pissa_init": True, "quantization_bit": 4}, "'pissa_init' needs plain weights"),
        ({"finetuning_type": "full", "use_llama_pro": True}, "'use_llama_pro' is not read with this 'finetuning_type', found 'full'"),
        ({"finetuning_type": "peft", "peft_type": "prompt_tuning"}, "'peft_type'"),
        ({"finetuning_type": "peft", "peft_type": "loha", "peft_config": {"rr": 3}}, "'peft_config' has no key 'rr'"),
        ({"finetuning_type": "peft", "peft_type": "loha", "peft_config": {"r": "much"}}, "'peft_config' holds 'much' for 'r'"),
        ({"finetuning_type": "peft", "peft_type": "loha", "peft_config": {"task_type": "CAUSAL_LM"}}, "'peft_config'"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], text: str, keys: Keys) -> None:
    with pytest.raises(UserError) as caught:
        Run.from_dict(keys(**changes), trains=True)
    assert text in str(caught.value)


def test_a_kind_that_cannot_be_merged_says_so(keys: Keys) -> None:
    names = keys(finetuning_type="peft", peft_type="lily", learning_rate=0.01)
    train(Run.from_dict(names))
    with pytest.raises(UserError, match="cannot be merged into weights"):
        export(Run.from_dict(names))


def test_layers_of_another_model_are_told(tmp_path: Path, keys: Keys) -> None:
    first = train(Run.from_dict(keys(finetuning_type="oft", oft_block_size=8)))
    wide = build_model(tmp_path / "wide", hidden_size=48)
    with pytest.raises(UserError, match="does not fit this model"):
        train(
            Run.from_dict(
                keys(model_name_or_path=str(wide), finetuning_type="oft", adapter_name_or_path=str(first), output_dir=str(tmp_path / "o"))
            )
        )
