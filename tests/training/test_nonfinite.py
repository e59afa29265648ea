"""The first number that is not finite is found where it was planted, and a step that went wrong can be done again elsewhere."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finery.data.rows.base import Row, lay, pad
from finery.methods.base import next_token_loss
from finery.models.head import bare, teach
from finery.models.kernels import KERNELS
from finery.models.load import load_model
from finery.training.choices import Choices
from finery.training.fast import make_fast
from finery.training.nonfinite import NonFinite, find_non_finite, load_repro, save_repro

ROWS = [Row(ids := np.arange(start, start + n, dtype=np.int32), ids, origin=(start,)) for start, n in ((3, 9), (40, 6))]


def built(folder: Path, way: str) -> Any:
    """The tiny model in training, trained as a whole or by LoRA, with or without kernels and recomputation."""
    model = load_model(folder, torch.float32, False).train()
    if "lora" in way:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    if "fast" in way:
        make_fast(model, {part: KERNELS[part].Options() for part in KERNELS.names()}, Choices({}), None)
    if "recomputed" in way:
        model.enable_input_require_grads()
        bare(model).activation_checkpointing_enable({"use_reentrant": "re-entrant" in way})
    teach(bare(model))
    return model


def loss_of(model: Any, fast: bool, token_loss: Any = None) -> Tensor:
    return next_token_loss(model, lay(ROWS) if fast else pad(ROWS), token_loss).total


def find(model: Any, fast: bool = False) -> NonFinite | None:
    return find_non_finite(model, lambda: loss_of(model, fast))


WAYS = ("plain", "fast", "lora", "lora fast", "recomputed", "lora fast recomputed", "recomputed re-entrant")


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_found_and_nothing_is_changed(way: str, tiny_model: Path) -> None:
    """Hooks are gone, gradients and dice are as they were, and the loss under watch has the same bits."""
    model = built(tiny_model, way)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    trained[0].grad = torch.ones_like(trained[0])
    seen: list[Tensor] = []

    def work() -> Tensor:
        seen.append(loss_of(model, "fast" in way))
        return seen[-1]

    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]  # recomputation with peft has some of its own
    dice = torch.get_rng_state()
    assert find_non_finite(model, work) is None
    assert torch.equal(torch.get_rng_state(), dice)
    work()
    assert torch.equal(*(loss.detach() for loss in seen))
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert not any(weight._backward_hooks for weight in trained)
    assert torch.equal(trained[0].grad, torch.ones_like(trained[0])) and all(weight.grad is None for weight in trained[1:])


def test_a_weight_that_is_not_finite(tiny_model: Path) -> None:
    model = built(tiny_model, "plain")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 4] = math.nan
        model.model.norm.weight[0] = math.inf
    found = find(model)
    names = ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight")
    assert found is not None and (found.where, found.module, found.kind) == ("weight", "model.layers.1.self_attn.q_proj", "Linear")
    assert found.weights == names and (found.count, found.size) == (1, 32 * 32) and 0 < found.largest_input < 1
    assert str(found).startswith(f"the weight {names[0]} and 1 others are not finite before the step: 1 of 1,024 numbers")


@pytest.mark.parametrize(
    ("way", "wanted"),
    [
        ("plain", ("model.layers.1.mlp.down_proj", "Linear")),
        ("recomputed", ("model.layers.1.mlp.down_proj", "Linear")),
        ("lora", ("base_model.model.model.layers.1.mlp.down_proj.base_layer", "Linear")),
        ("lora fast", ("base_model.model.model.layers.1.mlp.down_proj", "Linear")),
    ],
)
def test_the_first_module_that_overflows(way: str, wanted: tuple[str, str], tiny_model: Path) -> None:
    """Its weights are finite, and so is what goes in; a kernel that computes for it is told of the module around it."""
    model = built(tiny_model, way)
    parts = {name.rpartition("layers.1.mlp.")[2]: weight for name, weight in model.named_parameters()}
    with torch.no_grad():
        for part, value in (("gate_proj", 5.0), ("up_proj", 5.0), ("down_proj", 3e38)):
            parts[f"{part}.base_layer.weight" if "lora" in way else f"{part}.weight"].abs_().clamp_(min=value)
    found = find(model, "fast" in way)
    assert found is not None and found.where == "output"
    assert (found.module, found.kind) == wanted
    assert 1 < found.largest_input < 1e6 and found.count > 0


class Between(nn.Module):
    """Computes something itself between two layers, or has a part whose backward pass fails."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.change = nn.Linear(4, 4), nn.Linear(4, 4), change

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.change(self.first(x)))


class Change(nn.Module):
    """The same as a module of its own."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def broken_root(x: Tensor) -> Tensor:
    """Finite, and its derivative is not."""
    return x + torch.sqrt(x * 0)


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "output": (lambda x: x / 0, "output"),
    "gradient": (broken_root, "gradient"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("is_part", [False, True])
def test_between_modules_and_in_one(case: str, is_part: bool) -> None:
    """What a module does itself between its parts is told of it, not of the part that comes next."""
    change, where = CHANGES[case]
    model = nn.Sequential(nn.Linear(4, 4), Between(Change(change) if is_part else change), nn.Linear(4, 4))
    found = find_non_finite(model, lambda: model(torch.ones(2, 4)).sum())
    assert found is not None and (found.where, found.module) == (where, "1.change" if is_part else "1")
    assert found.kind == ("Change" if is_part else "Between") and 0 < found.largest_input < 10


def test_siblings_that_share_an_input() -> None:
    """Which of them is at fault cannot be told: the module is named that called both, or the weight whose gradient is broken."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = nn.Linear(4, 4), Change(broken_root)

        def forward(self, x: Tensor) -> Tensor:
            return self.good(x) + self.bad(x)

    model = nn.Sequential(nn.Linear(4, 4), Both())
    found = find_non_finite(model, lambda: model(torch.ones(2, 4)).sum())
    assert found is not None and (found.where, found.module) == ("gradient", "1")


def test_inputs_and_losses(tiny_model: Path) -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    found = find_non_finite(plain, lambda: plain(torch.full((2, 4), math.inf)).sum())
    assert found is not None and (found.where, found.module, found.count) == ("input", "", 8)
    model = built(tiny_model, "fast")
    found = find_non_finite(model, lambda: loss_of(model, True, lambda scores, target, reference: scores.sum() / 0))
    assert found is not None and (found.where, found.module, found.kind) == ("loss", "", "LlamaForCausalLM")
    found = find_non_finite(model, lambda: loss_of(model, True) * math.nan)
    assert found is not None and found.where == "loss"
    found = find_non_finite(model, lambda: loss_of(model, True, lambda scores, target, reference: broken_root(scores).sum()))
    assert found is not None and (found.where, found.module) == ("gradient", "")


@pytest.mark.parametrize("way", ["plain", "lora", "lora fast", "recomputed"])
def test_a_gradient_of_a_real_model(way: str, tiny_model: Path) -> None:
    model = built(tiny_model, way)
    name, layer = next((name, module) for name, module in model.named_modules() if name.endswith("layers.1.post_attention_layernorm"))
    forward = layer.forward
    layer.forward = lambda x: broken_root(forward(x))
    found = find(model, "fast" in way)
    assert found is not None and (found.where, found.module, found.kind) == ("gradient", name, "LlamaRMSNorm")


def test_what_fails_leaves_no_hooks(tiny_model: Path) -> None:
    model = built(tiny_model, "plain")

    def fails() -> Tensor:
        loss_of(model, False)
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        find_non_finite(model, fails)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def of_row(row: Row) -> tuple[Any, ...]:
    return row.ids.tolist(), row.labels.tolist(), None if row.positions is None else row.positions.tolist(), row.origin


def test_a_step_that_went_wrong_can_be_done_again(tiny_model: Path, tmp_path: Path) -> None:
    """Rows, weights and report are read back, and a model that is loaded anew makes the same NaN in the same place."""
    model = built(tiny_model, "lora fast")
    rows = [ROWS[0], Row(ROWS[1].ids, ROWS[1].labels, np.asarray([0, 1, 2, 0, 1, 2], np.int32), (7, 8))]
    weight = next(weight for name, weight in model.named_parameters() if "layers.0.mlp.down_proj.lora_B" in name)
    with torch.no_grad():
        weight.fill_(3e38)

    def done(by: Any, given: list[Row]) -> NonFinite | None:
        torch.manual_seed(4)  # LoRA has dropout here
        return find_non_finite(by, lambda: next_token_loss(by, lay(given)).total)

    found = done(model, rows)
    assert found is not None
    told = ["data set 'sums', sums.json row 3", "data set 'sums', sums.json row 7, row 8"]
    folder = save_repro(tmp_path / "nonfinite", rows, model, step=12, loss=math.nan, told=told, found=found)
    assert folder == tmp_path / "nonfinite" / "step-12"
    assert {path.name for path in folder.iterdir()} == {"rows.safetensors", "weights.safetensors", "report.json"}
    report = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert (report["step"], report["loss"], report["rows"]) == (12, "nan", told)
    assert report["found"]["module"].endswith("layers.0.mlp.down_proj") and report["text"] == str(found)

    repro = load_repro(folder)
    for row, read in zip(rows, repro.rows, strict=True):
        assert of_row(row) == of_row(read)
        assert read.ids.dtype == np.int32
    again = built(tiny_model, "lora fast")
    assert done(again, rows) is None
    trained = {name for name, weight in again.named_parameters() if weight.requires_grad}
    assert repro.weights.keys() == trained
    again.load_state_dict(repro.weights, strict=False)
    assert done(again, repro.rows) == found
