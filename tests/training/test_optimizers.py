"""Optimizers: each against its package's own use, trained, resumed, and what each refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import build_model
from finery.errors import UserError
from finery.run import Run
from finery.training.joined import InHooks
from finery.training.optimizers import OPTIMIZERS
from finery.training.optimizers.base import Optimizer, Setting
from watched import Bench, Outcome, losses

NORMS = ("norm",)
DECAY = 0.1
ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(tiny_model))


def part(name: str, **keys: Any) -> Optimizer:
    """One of ours, with its keys."""
    kind = OPTIMIZERS[name]
    return kind(kind.Options(**keys))


def setting(model: nn.Module, name: str = "adamw_torch", decay: float = 0.0, **arguments: Any) -> Setting:
    decayed = frozenset(key for key, _ in model.named_parameters() if not any(word in key for word in NORMS))
    return Setting(name, torch.optim.AdamW, arguments or ADAM, decay, decayed)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int, first: int = 0) -> dict[str, torch.Tensor]:
    """Steps with the same drawn gradients for everybody; the weights after them."""
    for number in range(first, first + times):
        dice = torch.Generator().manual_seed(number)
        noise = [torch.randn(weight.shape, generator=dice).to(weight.dtype) for weight in model.parameters()]
        total = sum((weight * one).sum() for weight, one in zip(model.parameters(), noise, strict=True) if weight.requires_grad)
        total.backward()  # type: ignore[union-attr]
        optimizer.step()
        model.zero_grad()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def fresh(model: Any) -> Any:
    from copy import deepcopy

    return deepcopy(model)


# ------------------------------------------------------------------ against the package's own use


def grouped(model: nn.Module, projected: dict[str, Any]) -> list[Any]:
    """As the READMEs of GaLore and APOLLO show it, with norms that do not decay."""
    named = dict(model.named_parameters())
    linear = [name for name in named if "proj" in name]
    return [
        {"params": [named[name] for name in named if "embed" in name], "weight_decay": DECAY},
        {"params": [named[name] for name in linear], "weight_decay": DECAY, **projected},
        {"params": [named[name] for name in named if "norm" in name], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("kind", ["std", "reverse_std", "right", "left", "full"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_galore_is_the_package_s(kind: str, optim: str, model: Any) -> None:
    import galore_torch

    projected = {"rank": 4, "update_proj_gap": 2, "scale": 0.5, "proj_type": kind}
    theirs = fresh(model)
    if optim == "adafactor":
        arguments: dict[str, Any] = {"lr": 1e-2, "scale_parameter": False, "relative_step": False}
        reference = galore_torch.GaLoreAdafactor(grouped(theirs, projected), **arguments)
    else:
        reference = galore_torch.GaLoreAdamW(grouped(theirs, projected), no_deprecation_warning=True, **ADAM)
    keys = {"galore_rank": 4, "galore_update_interval": 2, "galore_scale": 0.5, "galore_proj_type": kind}
    ours = part("galore", use_galore=True, **keys).build(model, setting(model, optim, DECAY))
    assert same(step(model, ours, 5), step(theirs, reference, 5))


@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("front", [False, True])
def test_apollo_is_the_package_s(proj: str, scale_type: str, front: bool, model: Any) -> None:
    from apollo_torch import APOLLOAdamW

    projected = {"rank": 4, "proj": proj, "scale_type": scale_type, "update_proj_gap": 2, "scale": 8.0, "proj_type": "std"}
    theirs = fresh(model)
    reference = APOLLOAdamW(grouped(theirs, projected), scale_front=front, **ADAM)
    keys = {"apollo_rank": 4, "apollo_update_interval": 2, "apollo_scale": 8.0, "apollo_proj": proj, "apollo_scale_type": scale_type}
    ours = part("apollo", use_apollo=True, apollo_scale_front=front, **keys).build(model, setting(model, decay=DECAY))
    assert same(step(model, ours, 5), step(theirs, reference, 5))


@pytest.mark.parametrize("mode", ["ascending", "descending", "random"])
@pytest.mark.filterwarnings("ignore:BAdam expect model to be loaded in fp16:UserWarning")
def test_badam_by_layers_is_the_package_s(mode: str, model: Any) -> None:
    from badam import BlockOptimizer

    theirs = fresh(model)
    base = torch.optim.AdamW(theirs.parameters(), weight_decay=0.0, **ADAM)
    torch.manual_seed(3)
    reference = BlockOptimizer(base, list(theirs.named_parameters()), switch_block_every=3, switch_mode=mode, verbose=0)
    torch.manual_seed(3)
    ours = part("badam", use_badam=True, badam_switch_mode=mode, badam_switch_interval=3).build(model, setting(model))
    torch.manual_seed(4)
    found = step(model, ours, 7)
    torch.manual_seed(4)
    assert same(found, step(theirs, reference, 7))


@pytest.mark.parametrize("mask", ["adjacent", "scatter"])
def test_badam_by_shares_is_the_package_s(mask: str, tmp_path: Path) -> None:
    from badam import BlockOptimizerRatio
    from transformers import AutoModelForCausalLM

    folder = build_model(tmp_path / "untied", tie_word_embeddings=False)  # the package fails where there is no head
    ours_model, theirs = (AutoModelForCausalLM.from_pretrained(str(folder)) for _ in range(2))
    torch.manual_seed(3)
    keys = {"badam_mode": "ratio", "badam_update_ratio": 0.2, "badam_switch_interval": 3, "badam_mask_mode": mask}
    ours = part("badam", use_badam=True, **keys).build(ours_model, setting(ours_model))
    torch.manual_seed(3)
    shared: dict[str, Any] = {"update_ratio": 0.2, "switch_every": 3, "mask_mode": mask, "verbose": 0}
    reference = BlockOptimizerRatio([{"params": list(theirs.parameters())}], list(theirs.named_parameters()), **shared, **ADAM)
    assert same(step(ours_model, ours, 7), step(theirs, reference, 7))


def test_adam_mini_is_the_package_s(model: Any) -> None:
    from adam_mini import Adam_mini

    theirs = fresh(model)
    reference = Adam_mini(theirs.named_parameters(), weight_decay=DECAY, dim=32, n_heads=4, n_kv_heads=2, verbose=False, **ADAM)
    ours = part("adam_mini", use_adam_mini=True).build(model, setting(model, decay=DECAY))
    assert same(step(model, ours, 5), step(theirs, reference, 5))


def test_muon_is_torch_s_with_adamw_for_the_rest(model: Any) -> None:
    theirs = fresh(model)
    named = dict(theirs.named_parameters())
    matrices = [weight for name, weight in named.items() if "proj" in name]
    groups = [{"params": [named["model.embed_tokens.weight"]], "weight_decay": DECAY}]
    groups += [{"params": [weight for name, weight in named.items() if "norm" in name], "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups, **ADAM)

    class Both:
        def step(self) -> None:
            muon.step()
            adamw.step()

    ours = part("muon", use_muon=True).build(model, setting(model, decay=DECAY))
    assert same(step(model, ours, 5), step(theirs, Both(), 5))  # type: ignore[arg-type]


def test_muon_s_step_is_orthogonal_and_as_long_as_adamw_s(model: Any) -> None:
    """Liu et al.: 0.2 times the learning rate in the root mean square, whatever the gradient's length."""
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    step(model, part("muon", use_muon=True).build(model, setting(model)), 1)
    moved = (weight.detach() - before) / 1e-2
    assert float(moved.pow(2).mean().sqrt()) == pytest.approx(0.2, rel=0.2)
    singular = torch.linalg.svdvals(moved)
    assert float(singular.max() / singular.min()) < 2  # those of the gradient differ by more


def test_loraplus_is_two_learning_rates(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    ours_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    theirs = fresh(ours_model)
    named = [(name, weight) for name, weight in theirs.named_parameters() if weight.requires_grad]
    rates = {"lora_A": 1e-2, "lora_B": 16e-2}
    groups = [{"params": [weight for name, weight in named if word in name], "lr": rate} for word, rate in rates.items()]
    ours = part("loraplus", loraplus_lr_ratio=16).build(ours_model, setting(ours_model, decay=DECAY))
    reference = torch.optim.AdamW(groups, weight_decay=DECAY, **ADAM)
    assert same(step(ours_model, ours, 5), step(theirs, reference, 5))


# ------------------------------------------------------------------ in a run

LOW = {"galore_rank": 4, "galore_update_interval": 2}
PLAIN = {"packed_attention": False, "rms_norm": False, "gated_mlp": False, "rotary": False, "head_loss": False}
RUNS: dict[str, dict[str, Any]] = {
    "galore": {"use_galore": True, "galore_proj_type": "full", **LOW},
    "galore adafactor": {"use_galore": True, "optim": "adafactor", **LOW},
    "galore layerwise": {"use_galore": True, "galore_layerwise": True, **LOW},
    "apollo": {"use_apollo": True, "apollo_rank": 4, "apollo_update_interval": 2},
    "apollo layerwise": {"use_apollo": True, "apollo_rank": 4, "apollo_proj": "svd", "apollo_layerwise": True},
    "badam": {"use_badam": True, "badam_switch_interval": 3, "badam_switch_mode": "random"},
    "badam half": {"use_badam": True, "badam_switch_interval": 4, "pure_bf16": True, **PLAIN},
    "badam ratio": {"use_badam": True, "badam_mode": "ratio", "badam_mask_mode": "scatter", "badam_update_ratio": 0.3},
    "adam_mini": {"use_adam_mini": True},
    "muon on adapters": {"use_muon": True, "finetuning_type": "lora"},
    "loraplus": {"loraplus_lr_ratio": 4, "finetuning_type": "lora"},
    "schedule-free": {"optim": "schedule_free_adamw", "warmup_steps": 1},
}
FULL = {"finetuning_type": "full", "learning_rate": 0.01, "max_steps": 20, "lr_scheduler_type": "constant"}


def weights(run: Outcome) -> dict[str, torch.Tensor]:
    assert not run.complaint
    return run.weights("model.safetensors" if "model.safetensors" in run.files else "adapter_model.safetensors")


AT_ONCE = ("galore layerwise", "apollo layerwise", "badam", "adam_mini", "muon on adapters")
"""Those that are tried every time; `make soak` tries all."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in AT_ONCE else [pytest.mark.slow]) for name in RUNS])
def test_learns_and_goes_on_where_it_stopped(name: str, bench: Bench) -> None:
    how = FULL | {"save_strategy": "steps", "save_steps": 17, "lr_scheduler_type": "linear"} | RUNS[name]
    whole = bench.train(**how)
    found = losses(whole)
    assert not whole.complaint
    assert sum(found[-3:]) < sum(found[:3])
    rest = bench.train(**how, resume_from_checkpoint=str(whole.folder / "checkpoint-17"))
    assert losses(rest) == found[17:]
    assert same(weights(whole), weights(rest))


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", pytest.param("adamw_torch_4bit", marks=pytest.mark.slow), "adamw_8bit"])
def test_a_state_of_few_bits_is_saved_and_read(optim: str, bench: Bench, tmp_path: Path) -> None:
    """Weights of fewer than 4096 entries have a state of 32 bits, so the usual tiny model would show nothing."""
    wide = build_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    how = FULL | {"optim": optim, "model_name_or_path": str(wide), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps, which takes half a minute
        whole = bench.train(**how)
        rest = bench.train(**how, resume_from_checkpoint=str(whole.folder / "checkpoint-2"))
    stored = (whole.folder / "checkpoint-2" / "optimizer.safetensors").stat().st_size
    assert stored < 2 * 4 * sum(weight.numel() for weight in whole.trainer.model.parameters()) * 0.75
    assert losses(rest) == losses(whole)[2:]
    assert same(weights(whole), weights(rest))


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_layer_by_layer_is_the_same_step_with_several_micro_batches(name: str, bench: Bench) -> None:
    """The gradient of the whole step counts, and the hooks leave none of it to be stepped later."""
    left: list[bool] = []
    step_rest = InHooks.step

    def spy(self: InHooks, closure: Any = None) -> None:
        left.extend(weight.grad is not None for group in self.param_groups for weight in group["params"])
        step_rest(self)

    bench.patch.setattr(InHooks, "step", spy)
    how = FULL | {f"use_{name}": True, f"{name}_rank": 4, "max_steps": 4, "max_grad_norm": 0.0, "token_budget": 140, "weight_decay": DECAY}
    whole, single = bench.train(**how), bench.train(**how, **{f"{name}_layerwise": True})
    rows = [row for place in range(4) for row in single.trainer.train_dataset[place]]
    assert len(single.trainer._share_out(rows)[0]) > 1
    assert left and not any(left)
    assert losses(whole) == losses(single)
    assert same(weights(whole), weights(single))


@pytest.mark.parametrize("name", [name for name, keys in RUNS.items() if "optim" not in keys and "finetuning_type" not in keys])
def test_a_schedule_reaches_every_weight(name: str, model: Any) -> None:
    keys = {key: value for key, value in RUNS[name].items() if key not in PLAIN and key != "pure_bf16"}
    kind = next(other for other in OPTIMIZERS.names() if f"use_{other}" in keys)
    chosen = part(kind, **keys)
    chosen.ends_step = True
    optimizer = chosen.build(model, setting(model, decay=DECAY))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    assert same(before, step(model, optimizer, 3))


def test_what_is_saved_is_what_a_schedule_free_optimizer_answers_with(bench: Bench) -> None:
    run = bench.train(**FULL | {"optim": "schedule_free_adamw", "max_steps": 6, "save_strategy": "steps", "save_steps": 4})
    now = dict(run.trainer.model.named_parameters())
    saved = weights(run)
    assert same(saved, {name: weight.detach() for name, weight in now.items()})
    run.trainer.optimizer.train()
    assert not same(saved, {name: weight.detach() for name, weight in now.items()})
    state = json.loads((run.folder / "checkpoint-4" / "optimizer.json").read_text())
    assert not any(group["train_mode"] for group in state["param_groups"])


@pytest.mark.parametrize("mode", ["layer", "ratio"])
def test_badam_leaves_alone_what_is_frozen(mode: str, bench: Bench, model: Any) -> None:
    run = bench.train(**FULL | {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "use_badam": True, "badam_mode": mode})
    before, after = {name: weight.detach() for name, weight in model.named_parameters()}, weights(run)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)


# ------------------------------------------------------------------ what is refused

GALORE, BADAM = {"use_galore": True, "finetuning_type": "full"}, {"use_badam": True, "finetuning_type": "full"}
LAYERWISE = GALORE | {"galore_layerwise": True}
MADE = "is made for whole weights: set 'finetuning_type' to full or freeze, found 'lora'"
FAULTS: list[tuple[dict[str, Any], str]] = [
    *[({f"use_{name}": True}, f"'use_{name}' {MADE}") for name in ("galore", "apollo", "badam")],
    (GALORE | {"use_muon": True}, "'use_galore' and 'use_muon' are optimizers: keep one"),
    (GALORE | {"optim": "sgd"}, "'use_galore' needs 'optim' to be one of adamw_torch, adamw_torch_fused, adafactor"),
    (GALORE | {"optim": "adamw_8bit"}, "'use_galore' with 'optim: adamw_8bit' needs a GPU"),
    (GALORE | {"galore_target": "nothing"}, "'galore_target' names no linear layer that is trained; this model has: down_proj"),
    (
        GALORE | {"galore_proj_type": "reverse_std", "galore_rank": 64},
        "'galore_proj_type: reverse_std' needs a lower 'galore_rank' than 64",
    ),
    (LAYERWISE | {"gradient_accumulation_steps": 2}, "'galore_layerwise' needs 'gradient_accumulation_steps: 1', found 2"),
    (LAYERWISE | {"micro_batches_at_once": 2}, "'use_galore' needs 'micro_batches_at_once: 1'"),
    (LAYERWISE | {"fp16": True}, "'galore_layerwise' steps weights before 'fp16' can scale gradients back"),
    ({"use_apollo": True, "finetuning_type": "full", "optim": "adafactor"}, "'use_apollo' needs 'optim' to be one of adamw_torch"),
    ({"use_apollo": True, "finetuning_type": "full", "apollo_proj_type": "left"}, "needs 'apollo_scale_type: tensor'"),
    (BADAM | {"badam_switch_mode": "fixed"}, "'badam_switch_mode' is 'fixed', which needs 'badam_start_block'"),
    (BADAM | {"badam_start_block": 2}, "'badam_start_block' should be below 2"),
    (BADAM | {"badam_switch_interval": 0}, "'badam_switch_interval' should be 1 or more, or -1"),
    (BADAM | {"optim": "sgd"}, "'use_badam' trains with AdamW: leave 'optim' out, found 'sgd'"),
    (BADAM | {"fp16": True}, "whose gradients 'fp16' cannot scale"),
    ({"optim": "grokadamw", "save_strategy": "steps"}, "'optim' is 'grokadamw', whose state cannot be saved"),
]


@pytest.mark.parametrize(("changes", "said"), FAULTS)
def test_says_what_does_not_fit(changes: dict[str, Any], said: str, bench: Bench) -> None:
    complaint = bench.train(**changes).complaint
    assert said in complaint and len(complaint.splitlines()) == 1


@pytest.mark.parametrize("changes", [LAYERWISE, BADAM, GALORE])
def test_several_processes(changes: dict[str, Any], bench: Bench) -> None:
    bench.patch.setenv("WORLD_SIZE", "2")
    try:
        Run.from_dict(bench.keys(**changes), trains=True)
        said = ""
    except UserError as error:
        said = str(error)
    assert ("works in one process" in said) is (changes is not GALORE)


@pytest.mark.parametrize("name", ["galore", "apollo", "badam", "adam_mini"])
def test_a_missing_package_is_named(name: str, bench: Bench) -> None:
    bench.patch.setattr("finery.training.optimizers.base.have", lambda module: False)
    complaint = bench.train(finetuning_type="full", **{f"use_{name}": True}).complaint
    assert complaint == f"Python: 'use_{name}' needs a package: pip install \"finery[optim]\""


def test_half_precision_is_advised(bench: Bench) -> None:
    assert "'use_galore' saves most memory with 'pure_bf16: true'" in bench.train(**GALORE, max_steps=1).said
