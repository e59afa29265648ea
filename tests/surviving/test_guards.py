"""Steps that are not finite, runs that learn nothing, and what is saved that is not what was trained: all are told."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build_model
from finery.cli import main
from finery.training.nonfinite import load_repro
from finery.training.trainer import Trainer
from survived import Stage, lines, weights


def poison(stage: Stage, step: int, how: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something to the trainer's model before a step, and take it back after it."""
    work = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step != step - 1:
            return work(self, *args, **kwargs)
        state = {name: value.clone() for name, value in self.model.state_dict().items()}  # type: ignore[union-attr]
        how(self.model)
        try:
            return work(self, *args, **kwargs)
        finally:
            self.model.load_state_dict(state)  # type: ignore[union-attr]

    monkeypatch.setattr(Trainer, "training_step", training_step)


def overflow(model: Any) -> None:
    """The second layer's MLP gives more than fp32 holds."""
    layer = model.get_base_model().model.layers[1].mlp
    layer.up_proj.base_layer.weight.data.fill_(1e30)
    layer.gate_proj.base_layer.weight.data.fill_(1e30)


def test_the_run_stops_and_tells_rows_and_module(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(stage, 3, overflow, monkeypatch)
    told = stage.complaint(output_dir=str(out := stage.tmp_path / "out"))
    assert "the loss of step 3 is not finite: " in told
    assert "layers.1.mlp" in told
    assert "data set 'sums', sums.json row " in told
    assert "'on_nonfinite: skip' would leave such steps out" in told
    repro = load_repro(out / "nonfinite" / "step-3")
    assert len(repro.rows) == 4 and repro.report["step"] == 3
    assert sorted((out / "nonfinite" / "step-3").iterdir())[0].suffix in (".json", ".safetensors")


def test_a_step_is_skipped_where_that_is_asked_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, and the optimizer's state, go on as if the step had not been; the others are stepped."""
    poison(stage, 3, overflow, monkeypatch)
    out = stage.train(output_dir=str(stage.tmp_path / "out"), on_nonfinite="skip")
    assert "The step is skipped" in stage.said
    assert all(np.isfinite(line["loss"]) for line in lines(out) if "loss" in line)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        before, after = (load_file(out / f"checkpoint-{step}" / name) for step in (2, 3))
        assert all(torch.equal(before[key], after[key]) for key in before), name
    assert weights(out) != (out / "checkpoint-3" / "adapter_model.safetensors").read_bytes()


def test_a_gradient_that_is_not_finite(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is finite, its slope is not."""
    work = Trainer._forward_and_backward

    def with_spoilt_gradient(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        share = work(self, *args, **kwargs)
        if self.state.global_step == 1:
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return share

    monkeypatch.setattr(Trainer, "_forward_and_backward", with_spoilt_gradient)
    told = stage.complaint()
    assert "the gradient of step 2 is not finite: each part of the step is finite by itself, their sum is not" in told


def test_too_many_skipped_steps_end_the_run(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Trainer._forward_and_backward
    monkeypatch.setattr(Trainer, "_forward_and_backward", lambda self, *args: work(self, *args) * float("nan"))
    told = stage.complaint(on_nonfinite="skip", max_steps=30)
    assert "the loss of step 10 is not finite" in told and "10 steps in a row were skipped" in told


NOTHING = "the run has changed nothing: every trained weight is what it was before, to the bit"
NEVER = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_stable_steps": 0, "num_decay_steps": 0}}
"""A schedule that is over before the first step."""


@pytest.mark.filterwarnings("ignore:Both num_training_steps")
def test_a_run_that_changes_nothing_ends_with_2(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """A schedule that is 0 in every step; steps that are lost in rounding."""
    given = stage.keys(**NEVER, max_steps=3)
    assert main(["train", *(f"{key}={json.dumps(value)}" for key, value in given.items())]) == 2
    assert f"{NOTHING} (the learning rate was 0 in every step)" in capsys.readouterr().err
    assert not (stage.tmp_path / "out" / "manifest.json").exists(), "it has not ended well"
    told = stage.complaint(pure_bf16=True, finetuning_type="full", learning_rate=1e-12, overwrite_output_dir=True, max_steps=2)
    assert told == f"{NOTHING} (steps were too small for the number format)"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"warmup_steps": 1000, "max_steps": 1}, "the learning rate was 0 in every step"),
        ({"learning_rate": 0, "max_steps": 3}, "'learning_rate' is 0"),
    ],
    ids=["a step of warmup", "as asked"],
)
def test_a_run_that_may_change_nothing_says_so(given: dict[str, Any], why: str, stage: Stage) -> None:
    """A single step, to see whether a run begins; a learning rate of 0 that was asked for."""
    out = stage.train(save_strategy="no", **given)
    assert stage.said.count(f"{NOTHING} ({why})") == 1
    assert json.loads((out / "manifest.json").read_text())["proof"] == {"weights_changed": False}


def test_a_run_of_skipped_steps_alone_changes_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Trainer._forward_and_backward
    monkeypatch.setattr(Trainer, "_forward_and_backward", lambda self, *args: work(self, *args) * float("nan"))
    assert stage.complaint(on_nonfinite="skip", max_steps=3, save_strategy="no") == f"{NOTHING} (every step was skipped)"


def test_nothing_that_gets_a_gradient_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Trainer._forward_and_backward

    def without(self: Trainer, *args: Any) -> Any:
        share = work(self, *args)
        self.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        return share

    monkeypatch.setattr(Trainer, "_forward_and_backward", without)
    assert "none of 28 trained weights gets a gradient" in stage.complaint()


def test_trained_weights_that_the_loss_does_not_depend_on_are_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer gets no gradient, since what it gives is cut off from what made it."""
    begin = Trainer.training_step

    def cut_off(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 0:
            layer = self.model.get_base_model().model.layers[0]  # type: ignore[union-attr]
            layer.register_forward_hook(lambda _, __, given: given.detach())
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", cut_off)
    stage.train(max_steps=3, save_strategy="no")
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert stage.said.count(f"14 of 28 trained weights got no gradient in the first step: {first}, ") == 1


def test_a_loss_of_0_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Trainer._forward_and_backward
    monkeypatch.setattr(Trainer, "_forward_and_backward", lambda self, *args: work(self, *args) * 0.0)
    stage.train(max_steps=12, save_strategy="no")
    assert stage.said.count("the loss has been 0 for 10 steps") == 1


def test_a_gradient_of_0_is_told(stage: Stage) -> None:
    """An adapter whose two factors are 0 stays there: neither has a slope."""
    start = stage.train(max_steps=1, save_strategy="no", output_dir=str(stage.tmp_path / "start"))
    path = start / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(weight) for name, weight in load_file(path).items()}, path, {"format": "pt"})
    told = stage.complaint(adapter_name_or_path=str(start), max_steps=11, save_strategy="no", optim="sgd")
    assert stage.said.count("the gradient has been 0 for 10 steps: nothing is learnt") == 1
    assert told.startswith(NOTHING)


def test_steps_without_a_token_to_learn_are_told(stage: Stage) -> None:
    """All answers of the first rows are cut away, which leaves the first two steps empty."""
    long = [{"instruction": "Why? " * 60, "output": "So."} if row < 4 else {"instruction": "Why?", "output": "So."} for row in range(8)]
    path = stage.tmp_path / "long.json"
    path.write_text(json.dumps(long))
    given = {"dataset": str(path), "disable_shuffling": True, "per_device_train_batch_size": 2, "save_strategy": "no"}
    out = stage.train(max_steps=4, cutoff_len=64, truncation="keep_start", **given)
    assert stage.said.count("step 1 has no token to learn.") == 1 and "step 2 has no token" not in stage.said
    assert [line["loss"] > 0 for line in lines(out) if "loss" in line] == [False, False, True, True]


@pytest.mark.parametrize("kind", ["lora", "full", "freeze"])
def test_what_was_saved_is_loaded_anew(kind: str, stage: Stage) -> None:
    extra = {"freeze_trainable_layers": 1} if kind == "freeze" else {}
    out = stage.train(finetuning_type=kind, save_verify=True, **extra)
    assert "loaded anew, what was saved gives a loss of" in stage.said
    proof = json.loads((out / "manifest.json").read_text())["proof"]
    assert proof["weights_changed"] is True and proof["saved"].startswith("loaded anew")


@pytest.mark.parametrize("given", [{}, {"loftq_init": True}], ids=["plain", "loftq"])
def test_what_was_trained_beside_few_bits_is_loaded_beside_as_many(given: dict[str, Any], stage: Stage, tmp_path: Path) -> None:
    """Beside the plain weights the same adapter has another loss, by far more than rounding moves it."""
    wide = build_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)  # for blocks of 64 weights
    few = {"model_name_or_path": str(wide), "quantization_bit": 2, "quantization_method": "hqq"}
    stage.train(save_verify=True, learning_rate=0.02, max_steps=6, **few, **given)
    told = [line for line in stage.said.splitlines() if "loaded anew, what was saved gives a loss of" in line]
    first, second = re.findall(r"\d+\.\d{4}", told[-1])
    assert abs(float(first) - float(second)) < 2e-4


def test_what_was_saved_wrongly_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Trainer._save

    def spoil(self: Trainer, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save(self, output_dir, state_dict)
        path = Path(str(output_dir)) / "adapter_model.safetensors"
        save_file({name: weight * 40 for name, weight in load_file(path).items()}, path, {"format": "pt"})

    monkeypatch.setattr(Trainer, "_save", spoil)
    told = stage.complaint(save_verify=True, save_strategy="no", learning_rate=0.05)
    assert "is not what was trained: loaded anew, it gives a loss of" in told
