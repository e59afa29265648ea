"""Golden losses: ten steps of each kind of training give the losses that they gave when they were written down.

Written anew with FINERY_WRITE_GOLDEN=1, which only a change to the loss excuses, or one to the order of samples (the losses in the
order of the file are then the same as before).
"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finery.commands.train import train
from finery.models.adapters import ADAPTERS
from finery.models.kernels import KERNELS
from finery.run import Run

GOLDEN = Path(__file__).parents[1] / "golden"


def machine() -> dict[str, str]:
    """Where a loss may be expected to the last digit: same processor, same instructions, same torch."""
    info = Path("/proc/cpuinfo")
    named = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    model = " ".join(value.strip() for key, value in named.items() if key.strip() in ("model name", "cpu family", "model", "stepping"))
    found = {"processor": model or platform.processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return found | {"torch": torch.__version__}


@pytest.mark.parametrize(("stage", "adapter"), [*(("sft", name) for name in ADAPTERS.names()), ("pt", "full")])
def test_losses_are_what_they_were(stage: str, adapter: str, keys: Callable[..., dict]) -> None:
    given = keys(
        stage=stage, finetuning_type=adapter, max_steps=10, val_size=4, eval_strategy="steps", eval_steps=5, gradient_accumulation_steps=2
    )
    folder = train(Run.from_dict(given | {KERNELS[name].switch: False for name in KERNELS.names()}))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = {name: [line[name] for line in history if name in line] for name in ("loss", "eval_loss")}
    assert len(found["loss"]) == 10
    path = GOLDEN / f"{stage}_{adapter}.json"
    if os.environ.get("FINERY_WRITE_GOLDEN"):
        path.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")
    golden = json.loads(path.read_text())
    for name, losses in found.items():
        assert losses == pytest.approx(golden[name], rel=1e-5)
        if golden["machine"] == machine():
            assert losses == golden[name]
