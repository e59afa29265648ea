"""Every name that `optim` takes: it trains and goes on where it stopped, or the run says what it needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.training_args import OptimizerNames

from watched import Bench, losses

FULL = {"finetuning_type": "full", "learning_rate": 0.01, "max_steps": 20, "lr_scheduler_type": "constant"}


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


REFUSED = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "Please install https://github.com/pytorch/torchdistx",
    **{name.value: "set 'use_galore: true'" for name in OptimizerNames if name.value.startswith("galore_")},
    **{name.value: "set 'use_apollo: true'" for name in OptimizerNames if name.value.startswith("apollo_")},
}
"""What cannot run here, and what the run says that names the package, the device or the key that serves."""
RATES = {"sgd": 1.0, "lomo": 1.0, "adagrad": 0.03, "schedule_free_sgd": 5.0, "lion_32bit": 1e-3, "lion_8bit": 1e-3}


AT_ONCE = ("adamw_torch", "adafactor", "adamw_8bit", "adamw_torch_8bit", "schedule_free_adamw", "stable_adamw", "lomo", "adalomo", *REFUSED)
"""Those that are tried every time; `make soak` tries all."""
NAMES = [pytest.param(n.value, marks=[] if n.value in AT_ONCE else [pytest.mark.slow]) for n in OptimizerNames]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning", "ignore:CUDA is not available:UserWarning")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_every_name_trains_or_says_what_it_needs(name: str, bench: Bench) -> None:
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps, which takes half a minute
        run = bench.train(**FULL | {"optim": name, "learning_rate": RATES.get(name, 0.01)})
    if name in REFUSED:
        assert len(run.complaint.splitlines()) == 1
        assert REFUSED[name] in run.complaint and "optim" in run.complaint
    else:
        found = losses(run)
        assert not run.complaint and len(found) == 20
        assert sum(found[-3:]) < sum(found[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name.value for name in OptimizerNames if name.value not in {*REFUSED, "grokadamw"}])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_every_name_goes_on_where_it_stopped(name: str, bench: Bench) -> None:
    how = FULL | {"optim": name, "learning_rate": RATES.get(name, 0.01), "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    with torch.compiler.set_stance("force_eager"):
        whole = bench.train(**how)
        rest = bench.train(**how, resume_from_checkpoint=str(whole.folder / "checkpoint-3"))
    assert losses(rest) == losses(whole)[3:]
    ends = [run.weights("model.safetensors") for run in (whole, rest)]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
