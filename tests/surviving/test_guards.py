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


def test_a_run_that_changes_nothing_is_told(stage: Stage) -> None:
    """Steps that are lost in rounding; a learning rate that never rises, which in a single step of warmup is a warning."""
    stage.train(warmup_steps=1000, max_steps=1)
    assert "the run has changed nothing" in stage.said and "the learning rate was 0 in every step" in stage.said
    told = stage.complaint(pure_bf16=True, finetuning_type="full", learning_rate=1e-12, overwrite_output_dir=True)
    assert "steps were too small for the number format" in told


def test_nothing_that_gets_a_gradient_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Trainer._forward_and_backward

    def without(self: Trainer, *args: Any) -> Any:
        share = work(self, *args)
        self.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        return share

    monkeypatch.setattr(Trainer, "_forward_and_backward", without)
    assert "none of 28 trained weights gets a gradient" in stage.complaint()


def test_a_loss_of_0_and_steps_without_labels_are_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Trainer._forward_and_backward
    monkeypatch.setattr(Trainer, "_forward_and_backward", lambda self, *args: work(self, *args) * 0.0)
    stage.train(max_steps=12)
    assert stage.said.count("the loss has been 0 for 10 steps") == 1
    from finery.data.rows.base import Row

    monkeypatch.setattr(Row, "num_supervised", property(lambda row: 0))
    stage.train(max_steps=2, overwrite_output_dir=True)
    assert stage.said.count("has no token to learn. Its rows: data set 'sums'") == 1


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
