"""LOMO and AdaLomo: their rules, and what steps within the backward pass, whatever a step is cut into."""

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finery.errors import UserError
from finery.run import Run
from finery.training.joined import InHooks
from finery.training.lomo import AdaLomo, Lomo
from watched import Bench, Outcome, losses

FULL = {"finetuning_type": "full", "max_steps": 20, "lr_scheduler_type": "linear", "weight_decay": 0.1}
RATES = {"lomo": 1.0, "adalomo": 0.01}
CUT = {"token_budget": 140}
"""Makes several micro-batches of each step."""


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


def how(name: str, **changes: Any) -> dict[str, Any]:
    return FULL | {"optim": name, "learning_rate": RATES[name]} | changes


def weights(run: Outcome) -> dict[str, Tensor]:
    assert not run.complaint
    return run.weights("model.safetensors" if "model.safetensors" in run.files else "adapter_model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def num_micro_batches(run: Outcome) -> int:
    rows = [row for place in range(4) for row in run.trainer.train_dataset[place]]
    return len(run.trainer._share_out(rows)[0])


# ------------------------------------------------------------------ the rules


class Two(nn.Module):
    """A matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.arange(12.0).reshape(3, 4) / 10 - 0.5)
        self.vector = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, number: int) -> Tensor:
        return ((self.matrix @ torch.tensor([1.0, 0.5, -1.0, float(number)]) + self.vector) ** 2).sum()


PACKAGE_S = {
    Lomo: (
        [[-0.526571, -0.411914, -0.266116, -0.212478], [0.137018, 0.118052, -0.137018, 0.471159], [0.096049, 0.295739, 0.696638, 0.265581]],
        [0.959717, -1.745613, 0.294221],
    ),
    AdaLomo: (
        [[-0.512938, -0.413576, -0.281965, -0.209316], [-0.040485, 0.058878, 0.040485, 0.26436], [0.23363, 0.332993, 0.561273, 0.523335]],
        [0.906106, -1.743963, 0.247293],
    ),
}
"""What lomo-optim 0.1.1 made of them in three steps with lr/1, lr/2, lr/3 and decay (its states, which it puts on a GPU, on the CPU)."""


@pytest.mark.parametrize(("rule", "lr"), [(Lomo, 0.05), (AdaLomo, 0.1)])
def test_the_rule_is_the_package_s(rule: type[Lomo], lr: float) -> None:
    model = Two()
    optimizer = rule(model.parameters(), lr=lr, weight_decay=0.1)
    for number in range(1, 4):
        optimizer.param_groups[0]["lr"] = lr / number
        optimizer.zero_grad()
        model(number).backward()
        optimizer.step()
    matrix, vector = PACKAGE_S[rule]
    assert torch.allclose(model.matrix, torch.tensor(matrix), atol=2e-6, rtol=0)
    assert torch.allclose(model.vector, torch.tensor(vector), atol=2e-6, rtol=0)


def written_out(weight: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """AdaLomo as the paper has it, in double precision."""
    weight, square = weight.double(), torch.zeros(())
    row, column = torch.zeros(weight.shape[0]).double(), torch.zeros(weight.shape[-1]).double()
    for t, gradient in enumerate(gradients, start=1):
        g, b = gradient.double(), 1 - t**-0.8
        if g.ndim == 2:
            row, column = b * row + (1 - b) * (g**2).mean(1), b * column + (1 - b) * (g**2).mean(0)
            u = g / torch.sqrt(torch.outer(row, column) / row.mean())
        else:
            square = b * square + (1 - b) * g**2
            u = g / torch.sqrt(square)
        u = u / max(1.0, math.sqrt(float((u**2).mean())))
        weight = weight - lr * max(1e-3, math.sqrt(float((weight**2).mean()))) * u
    return weight


@pytest.mark.parametrize("shape", [(5, 3), (4,), (1, 6)])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_adalomo_is_the_paper_s(shape: tuple[int, ...], scale: float) -> None:
    dice = torch.Generator().manual_seed(1)
    first = torch.randn(shape, generator=dice) * scale  # zeros are what an adapter begins with
    gradients = [torch.randn(shape, generator=dice) for _ in range(6)]
    weight = nn.Parameter(first.clone())
    optimizer = AdaLomo([weight], lr=0.1)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(weight.double(), written_out(first, gradients, 0.1), atol=1e-6)


def test_a_state_stays_in_fp32_where_weights_are_not() -> None:
    weight = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    weight.grad = torch.rand(3, 4).bfloat16()
    one, other = (AdaLomo([weight], lr=0.1) for _ in range(2))
    one.step()
    other.load_state_dict(one.state_dict())
    assert other.state[weight]["step"] == 1
    for name in ("row", "column"):
        assert other.state[weight][name].dtype == torch.float32
        assert torch.equal(other.state[weight][name], one.state[weight][name])


# ------------------------------------------------------------------ in a run

RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "in bf16": {"pure_bf16": True, "packed_attention": False, "rms_norm": False, "gated_mlp": False, "rotary": False, "head_loss": False},
    "lora": {"finetuning_type": "lora"},
    "recomputing, in parts": {"gradient_checkpointing": True, **CUT},
}
FASTER = {("adalomo", "lora"): 1.0, ("lomo", "lora"): 3.0}
"""AdaLomo's steps are as long as the weight, and an adapter's second matrix begins with zeros."""


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("kind", RUNS)
def test_learns_and_goes_on_where_it_stopped(name: str, kind: str, bench: Bench) -> None:
    given = how(name, learning_rate=FASTER.get((name, kind), RATES[name]), save_strategy="steps", save_steps=17, **RUNS[kind])
    whole = bench.train(**given)
    found = losses(whole)
    assert not whole.complaint and len(found) == 20
    assert sum(found[-3:]) < sum(found[:3])
    assert "the gradient has been 0" not in whole.said
    rest = bench.train(**given, resume_from_checkpoint=str(whole.folder / "checkpoint-17"))
    assert losses(rest) == found[17:]
    assert same(weights(whole), weights(rest))
    ends = [run.trainer.optimizer.state_dict()["parts"] for run in (whole, rest)]
    assert str(ends[0]) == str(ends[1])


def test_lomo_is_sgd(bench: Bench) -> None:
    """In its step; only gradients are let go earlier."""
    given = how("lomo", max_steps=4, weight_decay=0.0, max_grad_norm=0.0, **CUT)
    lomo, sgd = bench.train(**given), bench.train(**given | {"optim": "sgd", "micro_batches_at_once": 1})
    assert num_micro_batches(lomo) > 1
    assert losses(lomo) == losses(sgd)
    assert same(weights(lomo), weights(sgd))


@pytest.mark.parametrize("name", RATES)
def test_hooks_step_as_one_step_after_all_gradients_would(name: str, bench: Bench) -> None:
    """And they leave nothing to be stepped later."""
    left: list[bool] = []
    step_rest = InHooks.step

    def spy(self: InHooks, closure: Any = None) -> None:
        left.append(any(weight.grad is not None for group in self.param_groups for weight in group["params"]))
        step_rest(self)

    bench.patch.setattr(InHooks, "step", spy)
    given = how(name, max_steps=4, **CUT)
    hooked = bench.train(**given)
    assert num_micro_batches(hooked) > 1 and left == [False] * 4
    bench.patch.setattr(InHooks, "_step_one", lambda *_: None)
    later = bench.train(**given)
    assert left[4:] == [True] * 4
    assert losses(hooked) == losses(later)
    assert same(weights(hooked), weights(later))


@pytest.mark.parametrize("name", RATES)
def test_how_a_step_is_cut_does_not_matter(name: str, bench: Bench) -> None:
    """To rounding: several micro-batches add up in another order. Accumulated batches are one step as well, bit for bit."""
    whole, cut = bench.train(**how(name, max_steps=4)), bench.train(**how(name, max_steps=4, **CUT))
    assert num_micro_batches(whole) == 1 < num_micro_batches(cut)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.allclose(ours[key], theirs[key], atol=2e-5) for key in ours)
    halves = bench.train(**how(name, max_steps=4), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert whole.trainer.step_size == halves.trainer.step_size == 4
    assert same(weights(whole), weights(halves))


def test_one_gradient_is_held_at_a_time(bench: Bench) -> None:
    held: list[int] = []
    step_one = InHooks._step_one

    def spy(self: InHooks, part: Any, weight: Tensor) -> None:
        held.append(sum(one.grad is not None for group in self.param_groups for one in group["params"]))
        step_one(self, part, weight)

    bench.patch.setattr(InHooks, "_step_one", spy)
    run = bench.train(**how("lomo", max_steps=2))
    assert not run.complaint
    assert held == [1] * 2 * len(list(run.trainer.model.parameters()))
    gc.collect()


def test_clipping_is_told_to_have_no_effect(bench: Bench) -> None:
    run = bench.train(**how("lomo", max_steps=1, max_grad_norm=0.5))
    told = (run.folder / "run.yaml").read_text(encoding="utf-8")
    assert "max_grad_norm: 0.0  # decided: weights are stepped before the length of all gradients is known" in told
    assert 'optim: "lomo"  # Python' in told


def test_a_warm_up_reaches_every_weight(bench: Bench, tiny_model: Path) -> None:
    """The first step of a warm-up has a learning rate of nothing."""
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(str(tiny_model)).named_parameters())
    run = bench.train(**how("adalomo", max_steps=2, warmup_steps=1, save_strategy="steps", save_steps=1))
    first, second = weights(run) | run.weights("checkpoint-1/model.safetensors"), weights(run)
    assert all(torch.equal(first[name], before[name]) for name in first)
    assert not any(torch.equal(second[name], before[name]) for name in second)


# ------------------------------------------------------------------ what is refused

FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"fp16": True}, "'optim' is 'lomo', which steps weights before 'fp16' can scale gradients back"),
    ({"micro_batches_at_once": 2}, "'optim' needs 'micro_batches_at_once: 1': weights are stepped while gradients come, found 2"),
    ({"use_muon": True}, "'optim' and 'use_muon' are optimizers: keep one"),
]


@pytest.mark.parametrize(("changes", "said"), FAULTS)
def test_says_what_does_not_fit(changes: dict[str, Any], said: str, bench: Bench) -> None:
    complaint = bench.train(**how("lomo") | changes).complaint
    assert said in complaint and len(complaint.splitlines()) == 1


def test_several_processes_are_refused(bench: Bench) -> None:
    bench.patch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="'optim' is 'adalomo', which works in one process"):
        Run.from_dict(bench.keys(**how("adalomo")), trains=True)


def test_what_has_no_effect_is_told(bench: Bench) -> None:
    said = bench.train(**how("lomo", max_steps=1, optim_args="momentum=0.9")).said
    assert "'optim_args' has no effect with 'optim: lomo'" in said
    assert "'optim' is 'lomo', which saves most memory with 'pure_bf16: true'" in said


def test_the_other_s_checkpoint_is_refused(bench: Bench) -> None:
    run = bench.train(**how("lomo", max_steps=2, save_strategy="steps", save_steps=1))
    other = bench.train(**how("adalomo", max_steps=2), resume_from_checkpoint=str(run.folder / "checkpoint-1"))
    assert "optim" in other.complaint
