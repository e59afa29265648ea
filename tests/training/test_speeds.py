"""What a run tells of its speed, and what it settles from memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_model
from finery.commands.train import train
from finery.models import memory as models_memory
from finery.run import Run
from finery.training import clock, memory
from finery.training.clock import PHASES, Clock, bound, flops_each, product_peak
from finery.training.memory import bytes_per_token, fit

CPU = torch.device("cpu")


def test_a_run_tells_its_speeds(keys: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # of the tiny model, a step that takes a third of a second has so few operations a second that they are told as 0.0000 TFLOP/s
    wider = build_model(tmp_path / "wider", hidden_size=64, intermediate_size=256)
    folder = train(Run.from_dict(keys(model_name_or_path=str(wider))))
    results = json.loads((folder / "train_results.json").read_text())
    assert sum(results[f"train_{phase}_share"] for phase in PHASES) == pytest.approx(1, abs=1e-3)
    assert results["train_supervised_tokens_per_second"] > 0
    assert 0 < results["train_mfu"] < 1
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1 for line in lines if "loss" in line)
    said = capsys.readouterr().err
    assert "What bounds it: " in said and "steps begin: micro-batches of at most 1024 tokens, rows end to end" in said


def test_a_clock_counts_what_is_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second each, the pause before a start not counted; a lap begins where the one before ended."""
    times = iter([0.0, 1, 3, 6, 10, 100, 101, 102, 103, 104])
    monkeypatch.setattr("finery.training.clock.time.perf_counter", lambda: float(next(times)))
    clock = Clock(CPU)
    assert clock.report() == {}
    clock.start()
    for phase in PHASES:
        clock.mark(phase)
    clock.count(tokens=100, supervised=50, flops=2e13)
    first = clock.lap()
    assert (first["tokens_per_second"], first["supervised_tokens_per_second"], first["tflops"]) == (10, 5, 2)
    assert [first[f"{phase}_share"] for phase in PHASES] == [0.1, 0.2, 0.3, 0.4]
    clock.start()
    for phase in PHASES:
        clock.mark(phase)
    clock.count(tokens=100, supervised=100, flops=0)
    assert clock.lap()["tokens_per_second"] == 25
    assert clock.report()["tokens_per_second"] == pytest.approx(200 / 14, abs=0.1)


@pytest.mark.parametrize(
    ("shares", "mfu", "said"),
    [
        ((0.3, 0.3, 0.3, 0.1), 0.1, "the data"),
        ((0.0, 0.3, 0.3, 0.4), 0.1, "the optimizer"),
        ((0.0, 0.4, 0.5, 0.1), 0.6, "matrix products"),
        ((0.0, 0.4, 0.5, 0.1), 0.2, "memory traffic"),
    ],
)
def test_what_bounds_a_run(shares: tuple[float, ...], mfu: float, said: str) -> None:
    assert said in bound({f"{phase}_share": share for phase, share in zip(PHASES, shares, strict=True)}, mfu)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def test_operations_are_counted_by_weight(tiny_model: Path) -> None:
    model = load(tiny_model)
    linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    head = model.lm_head.weight.numel()
    assert flops_each(model) == (6 * linear, 6 * head)
    model.requires_grad_(False)
    assert flops_each(model) == (4 * linear, 4 * head)


def test_a_peak_is_measured_with_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.randn

    def scarce(*size: int, **how: Any) -> torch.Tensor:
        if size[0] > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(*size, **how)

    clock._product_peak.cache_clear()
    monkeypatch.setattr(torch, "randn", scarce)
    scanty = product_peak(torch.float32, CPU)
    assert scanty > 1e9
    monkeypatch.setattr(torch, "mm", None)
    assert product_peak(torch.float32, CPU) == scanty, "once in a process is enough"
    clock._product_peak.cache_clear()


def test_the_budget_follows_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_model).requires_grad_(False)
    whole, lean = (bytes_per_token(model, recompute) for recompute in (False, True))
    assert lean < whole
    for room, asked, budget, recompute in (
        (1e12, None, memory.MOST_TOKENS["cpu"], False),
        (200 * whole / memory.SHARE["cpu"], None, 200, False),
        (90 * whole / memory.SHARE["cpu"], None, int(90 * whole / lean), True),  # the longest row would not fit
        (90 * whole / memory.SHARE["cpu"], False, 90, False),
        (1e12, True, memory.MOST_TOKENS["cpu"], True),
        (0, None, memory.FEWEST_TOKENS, True),
    ):
        monkeypatch.setattr(memory, "free_bytes", lambda device, room=room: int(room) + 1)
        found = fit(model, 100, CPU, asked)
        assert (found.token_budget, found.recompute) == (budget, recompute)


def test_a_control_group_limits_memory(tmp_path: Path) -> None:
    assert models_memory._left_in_group(tmp_path) is None
    for name, text in (("memory.max", "1000\n"), ("memory.current", "700\n"), ("memory.stat", "anon 600\ninactive_file 50\n")):
        (tmp_path / name).write_text(text)
    assert models_memory._left_in_group(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert models_memory._left_in_group(tmp_path) is None
    assert models_memory.free_bytes(CPU) > 2**20


def test_precision_is_taken_where_it_is_there(keys: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `bf16` the device decides, and run.yaml says so."""
    for has, said in ((True, "bf16: true  # decided: this CPU computes bf16"), (False, "bf16: false  # decided: this CPU has no bf16")):
        monkeypatch.setattr("finery.models.precision.cpu_computes_bf16", lambda has=has: has)
        folder = train(Run.from_dict(keys(bf16=None, overwrite_output_dir=True)))
        assert said in (folder / "run.yaml").read_text()
