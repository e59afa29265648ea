"""What only a GPU can show: the kernels there, torch's attention over rows of many lengths, and steps done again after memory ran out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_model
from finery.commands.train import train
from finery.compat import takes_varlen
from finery.models.head import bare
from finery.run import Run
from finery.training.choices import Choices
from finery.training.fast import make_fast
from models.test_kernels import ROWS, build, lay, options, plain, rows_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "granite"])
def test_kernels_give_what_the_model_gives(family: str, half: bool) -> None:
    rows = rows_of(ROWS["many"])
    wanted = plain(build(family, "lora"), rows)
    model = build(family, "lora")
    if half:
        bare(model).to(torch.bfloat16)
    model.cuda()
    fast = make_fast(model, options(), Choices({}), torch.bfloat16 if half else None)
    assert fast.end_to_end, fast.left
    batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in lay(rows).items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        loss, gradients = losses_and_gradients_on_gpu(model, batch)
    assert loss == pytest.approx(float(wanted[0]), rel=2e-2 if half else 1e-3)
    ours, theirs = (torch.cat([part[name].flatten().float().cpu() for name in sorted(part)]) for part in (gradients, wanted[1]))
    assert float((ours - theirs).norm() / theirs.norm()) < (0.1 if half else 2e-3)


def losses_and_gradients_on_gpu(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(**{name: value for name, value in batch.items() if name != "labels"}, targets=batch["labels"])
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_varlen_attention_is_sdpa_row_by_row() -> None:
    from finery.models.kernels.functions.packed_attention import attend, attend_by_sdpa

    for window in (300, 40):
        tensors = [torch.randn(1, heads, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)]
        assert takes_varlen(tensors[0])
        starts = torch.tensor([0, 130, 131, 300], dtype=torch.int32, device="cuda")
        how = {"cu_seq_lens_q": starts, "max_length_q": 169, "sliding_window": window}
        results = []
        for function in (attend, attend_by_sdpa):
            out, _ = function(torch.nn.Identity(), *tensors, **how)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), tensors)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours.float(), theirs.float(), atol=5e-2, rtol=5e-2)


def test_a_step_that_ran_out_of_memory_is_done_again(keys: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The process may take little of the GPU: the budget that is asked for does not fit, the losses are those of one that does."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    model = build_model(tmp_path / "model", **sizes)
    losses = []
    for name, budget in (("roomy", 128), ("tight", 4096)):
        torch.cuda.empty_cache()
        if name == "tight":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 30 * 2**20) / total)
        changes = {"token_budget": budget, "bf16": False, "per_device_train_batch_size": 24, "output_dir": str(tmp_path / name)}
        changes |= {"model_name_or_path": str(model)}
        folder = train(Run.from_dict(keys(**changes)))
        log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in log if "loss" in line])
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory was used up" in (tmp_path / "tight" / "run.yaml").read_text()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
