"""early_stopping_steps: when a run stops, that a resumed one stops at the same place, and what it needs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finery.errors import UserError
from finery.run import Run
from finery.training.callbacks.early_stopping import num_since_best
from watched import Bench, Outcome, evaluated_at

NAN = float("nan")
WORSE: dict[str, Any] = {  # best after the third step
    "val_size": 4,
    "max_steps": 8,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "finetuning_type": "full",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
}
STOPS = WORSE | {"early_stopping_steps": 2}


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("values", "greater", "since"),
    [
        ([3.0], False, 0),
        ([3.0, 2.0, 1.0], False, 0),
        ([1.0, 2.0, 3.0], False, 2),
        ([1.0, 2.0, 3.0], True, 0),
        ([2.0, 1.0, 1.0], False, 1),  # as good is not better
        ([2.0, 1.0, 3.0, 1.0, 2.0], False, 3),
        ([1.0, NAN, NAN], False, 2),
        ([NAN, NAN], False, 1),
        ([NAN, 5.0, 6.0], False, 1),  # any number is better than none
        ([NAN, 5.0, 4.0], True, 1),
    ],
)
def test_evaluations_since_the_best(values: list[float], greater: bool, since: int) -> None:
    assert num_since_best(values, greater) == since


def stop_of(run: Outcome) -> int:
    """The step at which patience was used up, by what the run has measured itself."""
    values = [value for value in run.column("eval_loss") if value is not None]
    patience = 2
    return next(place + 1 for place in range(len(values)) if num_since_best(values[: place + 1], False) >= patience)


def last_step(run: Outcome) -> int:
    return json.loads((run.folder / "trainer_state.json").read_text())["global_step"]


def test_it_stops_when_patience_is_used_up(bench: Bench) -> None:
    whole, stopped = bench.once(**WORSE), bench.once(**STOPS)
    assert last_step(whole) == 8 and "training stops" not in whole.said
    assert last_step(stopped) == stop_of(whole) < 8
    told = [line for line in stopped.said.splitlines() if "training stops" in line]
    assert len(told) == 1 and told[0].startswith(
        f"training stops after step {stop_of(whole)} of 8: in 2 evaluations (early_stopping_steps)"
    )
    assert not stopped.complaint and (stopped.folder / "model.safetensors").exists()


def test_patience_that_is_not_used_up_changes_nothing(bench: Bench) -> None:
    plain, patient = bench.once(**WORSE), bench.train(**WORSE, early_stopping_steps=50)
    assert patient.column("eval_loss") == plain.column("eval_loss") and "training stops" not in patient.said


@pytest.mark.parametrize(
    "how",
    [
        {"save_strategy": "best"},
        {"save_strategy": "best", "load_best_model_at_end": True},
        {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True},
        {"save_strategy": "epoch"},
        {"metric_for_best_model": "loss"},
    ],
)
def test_with_every_way_to_save(bench: Bench, how: dict[str, Any]) -> None:
    stopped = bench.train(**STOPS, **how)
    assert last_step(stopped) == last_step(bench.once(**STOPS))
    if how.get("load_best_model_at_end"):
        assert stopped.column("eval_loss")[-1] == min(stopped.column("eval_loss"))


def test_by_epochs(bench: Bench) -> None:
    base = WORSE | {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": None, "num_train_epochs": 6}
    base |= {"learning_rate": 3.0, "early_stopping_steps": 1}
    stopped = bench.train(**base)
    assert evaluated_at(stopped)[-1] == last_step(stopped) < 30
    assert last_step(stopped) % 5 == 0


def test_what_is_greater_may_be_better(bench: Bench) -> None:
    rising = bench.train(**STOPS, greater_is_better=True)
    assert last_step(rising) != last_step(bench.once(**STOPS))


def test_of_several_sets_the_named_one_counts(bench: Bench) -> None:
    base = STOPS | {"val_size": None, "eval_dataset": "sums, names", "eval_on_each_dataset": True}
    assert "'early_stopping_steps' needs 'metric_for_best_model'" in bench.train(**base).complaint
    run = bench.train(**base, metric_for_best_model="eval_sums_loss")
    values = run.column("eval_sums_loss")
    assert last_step(run) == next(n for n in range(1, 9) if n == 8 or num_since_best(values[:n], False) >= 2)


def test_a_resumed_run_stops_where_an_undisturbed_one_does(bench: Bench) -> None:
    saves = STOPS | {"save_strategy": "steps", "save_steps": 1}
    whole = bench.once(**saves)
    end = last_step(whole)
    for start in range(1, end + 1):  # at the last one nothing is left to do but the end
        folder = bench.tmp_path / f"cut{start}"
        folder.mkdir()
        shutil.copytree(whole.folder / f"checkpoint-{start}", folder / f"checkpoint-{start}")
        rest = bench.train(**saves, output_dir=str(folder))
        assert not rest.complaint and last_step(rest) == end
        for name, tensor in whole.weights("model.safetensors").items():
            assert torch.equal(tensor, rest.weights("model.safetensors")[name])


def test_it_is_decided_by_nothing_but_what_was_measured() -> None:
    """Measured twice at a step (when a resumed run begins, say) counts once; what is measured after the last step decides nothing."""
    from finery.training.callbacks import CALLBACKS

    part = CALLBACKS["early_stopping"](CALLBACKS["early_stopping"].Options(early_stopping_steps=2))
    args = SimpleNamespace(metric_for_best_model=None, greater_is_better=None)
    state = SimpleNamespace(log_history=[{"step": 1, "eval_loss": 1.0}, *[{"step": 2, "eval_loss": 2.0}] * 3], global_step=2, max_steps=9)
    control = SimpleNamespace(should_training_stop=False)
    for in_train, more, stops in ((True, [], False), (False, [{"step": 3, "eval_loss": 2.0}], False), (True, [], True)):
        part.trainer = SimpleNamespace(is_in_train=in_train)
        state.log_history += more
        part.on_evaluate(args, state, control, metrics={"eval_loss": 2.0})
        assert control.should_training_stop == stops


def test_it_needs_evaluations(keys: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="'early_stopping_steps' needs evaluations to stop by: set 'eval_strategy'"):
        Run.from_dict(keys(early_stopping_steps=3), trains=True)
    with pytest.raises(UserError, match="'early_stopping_steps' should be above 0, found 0"):
        Run.from_dict(keys(early_stopping_steps=0, eval_strategy="steps", val_size=4), trains=True)
