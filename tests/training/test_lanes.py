"""Micro-batches side by side: the same step, whoever is faster."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from finery.commands.train import train
from finery.data.rows.base import Row
from finery.run import Run
from finery.training.lanes import share_out
from finery.training.steps import tokens_of


def rows_of(lengths: Any) -> list[Row]:
    """Rows of which only the length counts."""
    return [Row(np.ones(length, np.int32), np.ones(length, np.int32)) for length in lengths]


@given(st.lists(st.integers(1, 900), min_size=1, max_size=20), st.integers(1, 2000), st.integers(1, 9), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_row_is_in_one_lane_once(lengths: list[int], budget: int, most: int, end_to_end: bool) -> None:
    rows = rows_of(lengths)
    lanes = share_out(rows, budget, most, most, end_to_end)
    assert sorted(id(row) for lane in lanes for part in lane for row in part) == sorted(map(id, rows))
    assert len(lanes) <= most and all(part for lane in lanes for part in lane)
    if end_to_end:
        room = budget * 5 / 4 / len(lanes)  # fewer lanes have more room each
        assert all(tokens_of(part) <= room * most or len(part) == 1 for lane in lanes for part in lane)


def test_lanes_are_as_many_as_end_earliest() -> None:
    def sizes(lengths: Any, budget: int = 10_000) -> list[list[int]]:
        return [[tokens_of(part) for part in lane] for lane in share_out(rows_of(lengths), budget, 2, 2, end_to_end=True)]

    assert sizes([300, 200, 200, 100]) == [[400], [400]]
    assert sizes([300, 200, 200, 100], budget=400) == [[300, 100], [200, 200]]
    assert sizes([800, 10]) == [[810]]  # one long row is better shared by all threads
    assert sizes([20, 20]) == [[40]]  # products of few rows are slow


def run(keys: Callable[..., dict[str, Any]], folder: Path, at_once: int, **changes: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of a run whose micro-batches hold 60 tokens."""
    shared = {"token_budget": 60 * at_once, "max_steps": 3, "per_device_train_batch_size": 10, "logging_steps": 1}
    done = train(Run.from_dict(keys(**shared, **changes, micro_batches_at_once=at_once, output_dir=str(folder))))
    lines = [json.loads(line) for line in (done / "trainer_log.jsonl").read_text().splitlines()]
    name = "model" if changes.get("finetuning_type") == "full" else "adapter_model"
    return load_file(done / f"{name}.safetensors"), [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "changes", [{}, {"finetuning_type": "full"}, {"gradient_checkpointing": True}, {"packed_attention": False}], ids=str
)
def test_lanes_train_what_one_lane_trains(
    changes: dict[str, Any], keys: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding, and the same bits each time, although threads take turns as they please."""
    monkeypatch.setattr("finery.training.lanes.FEWEST_TOKENS", 1)
    wanted, wanted_losses = run(keys, tmp_path / "one", 1, **changes)
    ours, losses = run(keys, tmp_path / "three", 3, **changes)
    again, _ = run(keys, tmp_path / "again", 3, **changes)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert all(torch.allclose(ours[name], wanted[name], atol=2e-5) for name in wanted)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_what_fails_in_a_lane_is_raised(keys: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    from finery.training.trainer import Trainer

    monkeypatch.setattr("finery.training.lanes.FEWEST_TOKENS", 1)
    measure = Trainer._measure

    def failing(self: Any, model: Any, rows: list[Row]) -> Any:
        if self.lanes._mine.__dict__.get("sums") is not None:
            raise ArithmeticError("in a lane")
        return measure(self, model, rows)

    monkeypatch.setattr(Trainer, "_measure", failing)
    with pytest.raises(ArithmeticError, match="in a lane"):
        train(Run.from_dict(keys(micro_batches_at_once=2, token_budget=40)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "micro_batches_at_once: 2  # decided: one for each thread"),
        ({"lora_dropout": 0.1}, "micro_batches_at_once: 1  # decided: training draws random numbers"),
        ({"micro_batches_at_once": 3}, "micro_batches_at_once: 3"),
    ],
)
def test_how_many_lanes_is_written_down(
    changes: dict[str, Any], said: str, keys: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    folder = train(Run.from_dict(keys(**changes)))
    assert said in (folder / "run.yaml").read_text()
