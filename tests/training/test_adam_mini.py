"""Adam-mini on adapters: which weights share a second moment, and that it learns and goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finery.training.optimizers import OPTIMIZERS
from finery.training.optimizers.base import Setting
from watched import Bench, losses

ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
WIDTH = 8  # of a head of the tiny model


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


def adapted(folder: Path, **changes: Any) -> Any:
    """With adapters that are no longer where they begin."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    given: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"]} | changes
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(str(folder)), LoraConfig(**given))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape) / 10)
    return model


def built(model: nn.Module, decay: float = 0.0) -> torch.optim.Optimizer:
    kind = OPTIMIZERS["adam_mini"]
    setting = Setting("adamw_torch", torch.optim.AdamW, ADAM, decay, frozenset())
    return kind(kind.Options(use_adam_mini=True)).build(model, setting)


def written_out(weight: Tensor, gradients: list[Tensor], blocks: int, decay: float) -> Tensor:
    """The paper's formula: AdamW, with the mean of a block's squares for each of them."""
    first, second = torch.zeros_like(weight).view(blocks, -1), torch.zeros(blocks, 1)
    weight = weight.reshape(blocks, -1)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.reshape(blocks, -1)
        first = 0.9 * first + 0.1 * g
        second = 0.99 * second + 0.01 * (g**2).mean(dim=1, keepdim=True)
        weight = weight * (1 - 1e-2 * decay)
        weight = weight - 1e-2 * first / (1 - 0.9**t) / ((second / (1 - 0.99**t)).sqrt() + 1e-8)
    return weight.reshape(gradients[0].shape)


def num_blocks(name: str, weight: Tensor) -> int:
    """A head of a query's or key's B is eight rows; all other matrices have a block for each row, and what is no matrix is one."""
    if weight.ndim != 2:
        return 1
    in_heads = "lora_B" in name and ("q_proj" in name or "k_proj" in name)
    return weight.shape[0] // WIDTH if in_heads else weight.shape[0]


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"rank_pattern": {"k_proj": 4}}, {"modules_to_save": ["down_proj"]}], ids=str)
def test_blocks_are_heads_and_rows(changes: dict[str, Any], tiny_model: Path) -> None:
    model = adapted(tiny_model, **changes)
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in named.items()}
    optimizer = built(model, decay=0.1)
    dice = torch.Generator().manual_seed(1)
    drawn = [{name: torch.randn(weight.shape, generator=dice) for name, weight in named.items()} for _ in range(4)]
    for gradients in drawn:
        for name, weight in named.items():
            weight.grad = gradients[name].clone()
        optimizer.step()
    assert {num_blocks(name, weight) for name, weight in named.items()} >= {4, 2, 8, 16}  # heads of queries and of keys, rows
    for name, weight in named.items():
        wanted = written_out(before[name], [gradients[name] for gradients in drawn], num_blocks(name, weight), 0.1)
        assert torch.allclose(weight, wanted, atol=1e-5), name


def test_a_schedule_reaches_every_weight(tiny_model: Path) -> None:
    model = adapted(tiny_model)
    optimizer = built(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "embeddings as well": {"additional_target": "embed_tokens"},
    "oft": {"finetuning_type": "oft"},
    "ia3": {"finetuning_type": "peft", "peft_type": "ia3", "learning_rate": 0.1},
}


@pytest.mark.parametrize("name", KINDS)
def test_learns_and_goes_on_where_it_stopped(name: str, bench: Bench) -> None:
    how: dict[str, Any] = {"learning_rate": 0.01, "max_steps": 20, "save_strategy": "steps", "save_steps": 17} | KINDS[name]
    whole = bench.train(use_adam_mini=True, **how)
    found = losses(whole)
    assert not whole.complaint and len(found) == 20
    assert sum(found[-3:]) < sum(found[:3])
    rest = bench.train(use_adam_mini=True, **how, resume_from_checkpoint=str(whole.folder / "checkpoint-17"))
    assert losses(rest) == found[17:]
    one, other = whole.weights(), rest.weights()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
