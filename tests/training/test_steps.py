"""One optimizer step gives one gradient, however it is cut, padded, accumulated or dealt to ranks."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finery.commands.train import train
from finery.data.order import Sequential, Shuffled
from finery.data.rows.base import IGNORED, Row, RowOptions
from finery.data.rows.chat import Chat
from finery.errors import UserError
from finery.files import digest_of_file
from finery.methods.sft import SFT
from finery.run import Run
from finery.training.checkpoints import COMPLETE
from finery.training.choices import Choices
from finery.training.sampler import StepSampler
from finery.training.steps import cut
from finery.training.trainer import Trainer

Build = Callable[..., Trainer]


class Units(list[list[Row]]):
    """Units in memory; whoever deals them tells where it is."""

    def __init__(self, units: Sequence[list[Row]]) -> None:
        super().__init__(units)
        self.told: list[tuple[int, ...]] = []

    def begin(self, place: int) -> None:
        """The loop begins here."""
        self.told.append((place,))

    def advance(self, place: int, num_ahead: int) -> None:
        """The loop is here, and takes so many next."""
        self.told.append((place, num_ahead))


def seal(checkpoint: Path) -> None:
    """Make a checkpoint that a test has changed a whole one again."""
    marker = json.loads((checkpoint / COMPLETE).read_text())
    for name in marker["files"]:
        path = checkpoint / name
        marker["files"][name] = {"bytes": path.stat().st_size, "digest": digest_of_file(path)}
    (checkpoint / COMPLETE).write_text(json.dumps(marker))


def make_units(count: int = 12) -> Units:
    """Units of one row, some of two and some of none, lengths 2 to 40, a third of the tokens not learnt."""
    dice = np.random.default_rng(7)
    units = []
    for unit in range(count):
        rows = []
        for _ in range((1, 2, 1, 0)[unit % 4]):
            ids = dice.integers(3, 250, size=int(dice.integers(2, 40))).astype(np.int32)
            labels = np.where(dice.random(len(ids)) < 0.66, ids, IGNORED).astype(np.int32)
            rows.append(Row(ids, labels))
        units.append(rows)
    return Units(units)


@pytest.fixture
def build(tiny_model: Path, tmp_path: Path) -> Build:
    """A trainer on fresh copies of the tiny model."""
    from transformers import AutoModelForCausalLM, TrainingArguments

    def make(units: Units, step_size: int = 4, budget: int = 1000, at_once: int = 1, **changes: Any) -> Trainer:
        pinned = {"packed_attention": False, "gradient_checkpointing": False}
        arguments = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False,
            per_device_eval_batch_size=changes.pop("eval_batch", 2), logging_nan_inf_filter=False, save_strategy="no", logging_steps=1,
            **changes,
        )  # fmt: skip
        return Trainer(
            method=SFT(SFT.Options.model_validate({})),
            rows=Chat(None, RowOptions(cutoff_len=64)),  # type: ignore[arg-type]  # collates, and encodes nothing here
            step_size=step_size,
            choices=Choices({**pinned, "token_budget": budget, "micro_batches_at_once": at_once}),
            order=Sequential(len(units)),
            optimizer_part=None,
            save_beside=lambda folder: None,
            model=AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32),
            args=arguments,
            train_dataset=units,
            eval_dataset=units,
        )

    return make


def gradient(trainer: Trainer, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """What one step leaves in `.grad`."""
    trainer.create_optimizer()
    trainer.training_step(trainer.model, list(rows))  # type: ignore[arg-type]
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}  # type: ignore[union-attr]


def reference(trainer: Trainer, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """The same gradient without the trainer: one padded fp32 batch, one mean over supervised tokens, by hand."""
    longest = max(len(row.ids) for row in rows)
    total, weight = torch.zeros(()), 0
    model: Any = trainer.model
    model.train()
    ids = torch.stack([torch.nn.functional.pad(torch.from_numpy(row.ids).long(), (0, longest - len(row.ids))) for row in rows])
    mask = torch.stack([(torch.arange(longest) < len(row.ids)).long() for row in rows])
    logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    for place, row in enumerate(rows):
        for at in range(1, len(row.ids)):
            if row.labels[at] != IGNORED:
                total = total - logps[place, at - 1, int(row.labels[at])]
                weight += 1
    (total / weight).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def farthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference as a part of the largest entry."""
    assert found.keys() == wanted.keys()
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / scale


@pytest.mark.parametrize("budget", [1, 40, 90, 200, 100_000])
def test_every_cut_gives_the_gradient_of_one_batch(build: Build, budget: int) -> None:
    units = make_units()
    rows = [row for unit in range(len(units)) for row in units[unit]]
    wanted = reference(build(units), rows)
    assert farthest(gradient(build(units, budget=budget), rows), wanted) < 1e-6


def test_the_order_of_rows_does_not_matter(build: Build) -> None:
    units = make_units()
    rows = [row for unit in range(len(units)) for row in units[unit]]
    assert farthest(gradient(build(units, budget=60), rows[::-1]), gradient(build(units, budget=60), rows)) < 1e-6


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_batch_times_accumulation_makes_the_step(
    keys: Callable[..., dict], batch: int, accumulation: int, tmp_path: Path, tiny_model: Path
) -> None:
    from safetensors.torch import load_file

    both = []
    for name, settings in (("one", (8, 1)), ("other", (batch, accumulation))):
        given = keys(
            finetuning_type="full", optim="sgd", per_device_train_batch_size=settings[0], gradient_accumulation_steps=settings[1],
            output_dir=str(tmp_path / name), learning_rate=1.0, max_grad_norm=0, cutoff_len=48, max_steps=1,
        )  # fmt: skip
        both.append(load_file(train(Run.from_dict(given)) / "model.safetensors"))
    start = load_file(tiny_model / "model.safetensors")
    assert farthest(*({name: start[name] - weights[name] for name in start} for weights in both)) < 1e-6


def test_parts_hold_all_rows_within_the_budget() -> None:
    units = make_units(40)
    rows = [row for unit in range(len(units)) for row in units[unit]]
    for budget in (1, 30, 100, 400):
        parts = cut(rows, budget)
        assert sorted(id(row) for part in parts for row in part) == sorted(map(id, rows))
        assert all(len(part) == 1 or len(part) * max(len(row.ids) for row in part) <= budget for part in parts)


@pytest.mark.parametrize("eval_batch", [1, 3, 50])
def test_eval_loss_is_the_mean_over_tokens(build: Build, eval_batch: int) -> None:
    units = make_units()
    trainer = build(units, eval_batch=eval_batch, budget=70)
    rows = [row for unit in range(len(units)) for row in units[unit]]
    total, weight = 0.0, 0
    model: Any = trainer.model
    for row in rows:
        with torch.no_grad():
            logps = model(input_ids=torch.from_numpy(row.ids).long()[None]).logits[0].log_softmax(-1)
        for at in range(1, len(row.ids)):
            if row.labels[at] != IGNORED:
                total -= float(logps[at - 1, int(row.labels[at])])
                weight += 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / weight, rel=1e-5)


def test_eval_shows_nan_as_nan(build: Build) -> None:
    trainer = build(make_units())
    model: Any = trainer.model
    model.get_input_embeddings().weight.data[int(make_units()[0][0].ids[0])] = float("nan")
    assert np.isnan(trainer.evaluate()["eval_loss"])


def test_a_loss_that_is_not_finite_ends_the_run(build: Build) -> None:
    trainer = build(make_units(), max_steps=2)
    model: Any = trainer.model
    model.get_input_embeddings().weight.data[:] = float("nan")
    with pytest.raises(UserError, match=r"the loss of step 1 is not finite: the weight .*embed_tokens.weight"):
        trainer.train()


@pytest.mark.parametrize(("samples", "batch", "ranks"), [(10, 2, 1), (11, 2, 2), (7, 3, 3), (1, 4, 2), (24, 4, 3)])
def test_the_sampler_deals_every_sample_once(samples: int, batch: int, ranks: int) -> None:
    order = Shuffled(samples, 3)
    samplers = [StepSampler(order, batch, rank=rank, num_ranks=ranks) for rank in range(ranks)]
    lists = [list(sampler) for sampler in samplers]
    assert {len(steps) for steps in lists} == {-(-samples // (batch * ranks))} == {len(samplers[0])}
    assert sorted(unit for steps in lists for step in steps for unit in step) == list(range(samples))
    alone = list(StepSampler(order, batch * ranks))
    assert [sorted(step) for step in alone] == [sorted(unit for steps in lists for unit in steps[at]) for at in range(len(alone))]
    whole = [step for step in alone if len(step) == batch * ranks]
    assert list(StepSampler(order, batch * ranks, drop_last=True)) == whole


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = StepSampler(Shuffled(20, 1), 4)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(StepSampler(Shuffled(20, 2), 4)) != first
    assert [unit for step in StepSampler(Sequential(20), 4) for unit in step] == list(range(20))


def test_whoever_prepares_samples_is_told_where_the_loop_is() -> None:
    """Places count through all epochs; a resumed run begins where it goes on, and its steps are those of a run that never stopped."""
    units = Units([[]] * 10)
    sampler = StepSampler(Shuffled(10, 1), 2, watcher=units, num_ranks=2)
    sampler.set_epoch(2)
    whole = list(sampler)
    assert units.told == [(20,), (20, 4), (24, 4), (28, 4)]
    units.told.clear()
    sampler.skipped = 2
    assert list(sampler) == [[], [], whole[2]]
    assert units.told == [(28,), (28, 4)]
    assert list(sampler) == whole, "only one epoch is entered in the middle"


def in_two_processes(given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    words = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    environment = os.environ | {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "finery", "train", *words], env=environment, capture_output=True, text=True, timeout=600)


def test_two_processes_give_the_gradient_of_one(keys: Callable[..., dict], tmp_path: Path, tiny_model: Path) -> None:
    """Four steps of 19 samples, so that one process has none in the last; with SGD at rate 1 a step moves by the gradient."""
    from safetensors.torch import load_file

    common = {"finetuning_type": "full", "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "max_steps": 4, "val_size": 5}
    common |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": True}
    one = train(Run.from_dict(keys(**common, per_device_train_batch_size=6, output_dir=str(tmp_path / "one"))))
    two = tmp_path / "two"
    shutil.copytree(one, two)  # what an earlier run left is removed once, not by both at a time
    result = in_two_processes(keys(**common, per_device_train_batch_size=3, output_dir=str(two)))
    assert result.returncode == 0, result.stderr[-3000:]
    start = load_file(tiny_model / "model.safetensors")
    after = [load_file(folder / "checkpoint-1" / "model.safetensors") for folder in (one, two)]
    assert farthest(*({name: start[name] - weights[name] for name in start} for weights in after)) < 1e-6
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, two)]
    losses = [[line["loss"] for line in history if "loss" in line] for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    evals = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (one, two)]
    assert evals[0] == pytest.approx(evals[1], rel=1e-5)


def test_a_complaint_ends_two_processes_as_it_ends_one(keys: Callable[..., dict]) -> None:
    result = in_two_processes(keys(lora_target="nope"))
    assert result.returncode == 2
    assert "'lora_target': the model has no linear layer 'nope'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_step_that_ran_out_of_memory_is_done_again(at_once: int, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit stands for the memory of a GPU: no micro-batch may hold more tokens, and the second step comes to know it."""
    roomy, tight = (build(make_units(), budget=1000, max_steps=3, learning_rate=1e-2, at_once=at_once) for _ in range(2))
    measure, limit = tight._measure, max(len(row.ids) for unit in make_units()[4:8] for row in unit)

    def limited(model: Any, rows: Any) -> Any:
        if tight.state.global_step == 1 and sum(len(row.ids) for row in rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(model, rows)

    monkeypatch.setattr(tight, "_measure", limited)
    ends = []
    for trainer in (roomy, tight):
        trainer.train()
        ends.append(trainer.model.state_dict())  # type: ignore[union-attr]
    assert roomy.choices["token_budget"] == 1000 and tight.choices["token_budget"] < 2 * limit * at_once
    assert tight.choices.decided()["token_budget"][1] == "memory was used up (from step 2 on)"
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=2e-4) for name in ends[0])


def test_a_row_that_does_not_fit_is_told(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the budget is halved, then activations are recomputed; where that was not enough, the run ends with advice."""
    trainer = build(make_units(), budget=1000, max_steps=1)

    def never_fits(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "_measure", never_fits)
    with pytest.raises(UserError, match=r"out of memory in step 1 with a single row of \d+ tokens: a lower 'cutoff_len'"):
        trainer.train()


def test_choices_are_obeyed_on_resume(keys: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checkpoint tells counts, and no trial is made again."""
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = train(Run.from_dict(keys(**saves, output_dir=str(tmp_path / "whole"))))
    path = whole / "checkpoint-2" / "choices.json"
    told = json.loads(path.read_text())
    assert told["packed_attention"]["value"] is True and told["token_budget"]["value"] > 100
    told["token_budget"] |= {"value": 77, "why": "memory was used up", "step": 1}
    path.write_text(json.dumps(told))
    seal(path.parent)
    monkeypatch.setattr("finery.training.fast._Trial.measure", None)
    resumed = train(Run.from_dict(keys(**saves, output_dir=str(tmp_path / "rest"), resume_from_checkpoint=str(whole / "checkpoint-2"))))
    assert "token_budget: 77  # decided: memory was used up (from step 2 on)" in (resumed / "run.yaml").read_text()
    assert json.loads((resumed / "checkpoint-3" / "choices.json").read_text())["token_budget"] == told["token_budget"]


def test_kernels_that_were_given_up_stay_so_on_resume(keys: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would change the last bits of a run that began without them."""
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    with monkeypatch.context() as during:
        during.setattr("finery.training.fast._Trial.difference", lambda *_: "they differ")
        whole = train(Run.from_dict(keys(**saves, output_dir=str(tmp_path / "whole"))))
    resumed = train(Run.from_dict(keys(**saves, output_dir=str(tmp_path / "rest"), resume_from_checkpoint=str(whole / "checkpoint-2"))))
    told = [json.loads((folder / "checkpoint-3" / "choices.json").read_text()) for folder in (whole, resumed)]
    assert told[0].keys() == told[1].keys() and {"rms_norm", "head_loss"} <= told[1].keys()
    assert told[1]["rms_norm"] == {"value": False, "why": "they differ", "step": 0}
    assert "rms_norm: false  # decided: they differ" in (resumed / "run.yaml").read_text()


def test_bf16_weights_stay_so_on_resume(keys: Callable[..., dict], tmp_path: Path) -> None:
    """peft would widen an adapter that is read from a checkpoint, and lanes would then miss its gradients."""
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "pure_bf16": True, "finetuning_type": "lora", "learning_rate": 1e-2}
    saves |= {"micro_batches_at_once": 2, "token_budget": 64}
    whole = train(Run.from_dict(keys(**saves, output_dir=str(tmp_path / "whole"))))
    resumed = train(Run.from_dict(keys(**saves, output_dir=str(tmp_path / "rest"), resume_from_checkpoint=str(whole / "checkpoint-2"))))
    ours, theirs, before = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed, whole / "checkpoint-2"))
    assert all(weight.dtype == torch.bfloat16 and torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert any(not torch.equal(weight, before[name]) for name, weight in theirs.items())
