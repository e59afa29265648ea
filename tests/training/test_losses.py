"""Losses beside cross entropy, noise, routers, random weights and number formats: each against its formula, under any cut of a step."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finery.data.rows.base import Row, lay, pad
from finery.errors import UserError
from finery.methods import METHODS
from finery.methods.base import LearningOptions
from finery.methods.functions.token_losses import asft, dft, eaft, smoothed
from finery.models.head import TokenLoss, teach
from finery.models.kernels import KERNELS
from finery.models.kernels.functions import head_loss
from finery.models.kernels.functions.head_loss import ChunkedLoss, Measure, Shape
from finery.models.load import load_model
from finery.run import Run
from finery.training import fp8
from finery.training.choices import Choices
from finery.training.fast import make_fast
from keys_of_losses import build_experts
from watched import Bench, adapter_sum, losses

LOSSES: dict[str, TokenLoss] = {"dft": dft, "eaft": eaft(1.5), "asft": asft(0.3), "smoothed": smoothed(0.2)}
SWITCHES: dict[str, dict[str, Any]] = {
    "dft": {"use_dft_loss": True},
    "eaft": {"use_eaft_loss": True, "eaft_alpha": 1.5},
    "asft": {"use_asft_loss": True, "asft_alpha": 0.3},
    "smoothed": {"label_smoothing_factor": 0.2},
}


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


# ------------------------------------------------------------------ the formulas


def by_formula(name: str, scores_SV: Tensor, target_S: Tensor, reference_SV: Tensor) -> Tensor:
    """Token by token, from probabilities."""
    total = torch.zeros(())
    for scores, target, reference in zip(scores_SV, target_S, reference_SV, strict=True):
        p = torch.softmax(scores, 0)
        cost = -torch.log(p[target])
        if name == "dft":
            total = total + p[target].detach() * cost
        elif name == "eaft":
            likeliest = p.detach().sort(descending=True).values[:20]
            q = likeliest / likeliest.sum()
            total = total + (float(-(q * q.log()).sum()) / 3) ** 1.5 * cost
        elif name == "asft":
            r = torch.softmax(reference, 0)
            total = total + p[target].detach() * cost + 0.3 * (r * (r.log() - p.log())).sum()
        else:
            total = total + (1 - 0.2) * cost + 0.2 * -torch.log(p).mean()
    return total


class Numbers:
    """A config that does nothing to logits, or caps and scales them."""

    def __init__(self, **values: float) -> None:
        vars(self).update(values)

    def get_text_config(self) -> "Numbers":
        return self


@pytest.mark.parametrize("chunk", [1, 5 * 61 * 4 * 4, 2**25])  # the least (16 tokens), some 20, and all
@pytest.mark.parametrize("shape", [{}, {"final_logit_softcapping": 4.0, "logit_scale": 0.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_give_the_formula(name: str, shape: dict[str, float], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, and gradients of hidden states, weights and biases."""
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", chunk)
    dice = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 24, generator=dice, requires_grad=True) for n in (41, 61))
    bias = torch.randn(61, generator=dice, requires_grad=True)
    target, reference = torch.randint(0, 61, (41,), generator=dice), torch.randn(41, 61, generator=dice) * 3
    logits = hidden @ weight.t() + bias
    if shape:
        logits = 4.0 * torch.tanh(logits * 0.7 / 4.0)
    wanted = by_formula(name, logits, target, reference)
    gradients = torch.autograd.grad(wanted * 0.5, (hidden, weight, bias))
    given = reference if name == "asft" else None
    how = Measure(Shape(Numbers(**shape)), LOSSES[name], (lambda start, stop: given[start:stop]) if given is not None else None)
    ours: Any = ChunkedLoss.apply(hidden, weight, bias, target, how)
    assert float(ours.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for found, theirs in zip(torch.autograd.grad(ours * 0.5, (hidden, weight, bias)), gradients, strict=True):
        assert torch.allclose(found, theirs, rtol=1e-4, atol=1e-5)


def test_smoothing_is_that_of_transformers() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    scores, target = torch.randn(2, 9, 50), torch.randint(0, 50, (2, 9))
    wanted = LabelSmoother(epsilon=0.2)({"logits": scores}, target)
    assert float(smoothed(0.2)(scores.flatten(0, 1), target.flatten(), None)) / 18 == pytest.approx(float(wanted), rel=1e-5)


def test_a_head_in_half_precision_gives_scores_in_full(tiny_model: Path) -> None:
    """`upcast_lmhead_output` asks for no more: its result is what training computes anyway, plain and in chunks."""
    model = load_model(tiny_model, torch.bfloat16, False).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    hook = model.get_output_embeddings().register_forward_hook(lambda module, given, output: output.float())
    wanted = nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="sum")
    hook.remove()
    teach(model)
    assert torch.equal(model(input_ids=ids, targets=ids), wanted)
    ours = head_loss.chunked_loss(Shape(model.config), model, {"input_ids": ids}, ids)
    assert float(ours.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


# ------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("name", ["dft", "eaft", "smoothed"])
def test_a_batch_costs_what_its_rows_cost(name: str, tiny_model: Path) -> None:
    """The loss is a sum with a weight, and so are its gradients: rows end to end in chunks, beside each row alone through whole logits."""
    switches = dict(SWITCHES[name])
    learning = LearningOptions.model_validate({key: switches.pop(key) for key in list(switches) if key in LearningOptions.model_fields})
    method = METHODS["sft"](METHODS["sft"].Options(**switches), learning)
    dice = np.random.default_rng(0)
    rows = [Row(ids := dice.integers(1, 300, n).astype(np.int32), np.where(dice.random(n) < 0.6, ids, -100)) for n in (30, 7, 1, 18)]
    found = []
    for packs in (False, True):
        model = load_model(tiny_model, torch.float32, False).train()
        if packs:
            make_fast(model, {part: KERNELS[part].Options() for part in KERNELS.names()}, Choices({}), None)
        teach(model)
        parts = [method.loss(model, batch) for batch in ([lay(rows)] if packs else [pad([row]) for row in rows])]
        sum(part.total for part in parts).backward()  # type: ignore[union-attr]
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((float(sum(part.total.detach() for part in parts)), float(sum(part.weight for part in parts)), gradients))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-5)
    assert float((found[0][2] - found[1][2]).norm() / found[0][2].norm()) < 1e-4


def test_any_cut_of_a_step_trains_the_same(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed in one; padded in many micro-batches through the model's own logits; three side by side, whichever thread is faster."""
    monkeypatch.setattr("finery.training.lanes.FEWEST_TOKENS", 1)
    base = {**SWITCHES["asft"], "max_steps": 3, "per_device_train_batch_size": 10, "learning_rate": 0.01}
    whole = bench.train(**base, micro_batches_at_once=1)
    cut = bench.train(**base, micro_batches_at_once=1, token_budget=80, packed_attention=False, head_loss=False)
    beside = [bench.train(**base, micro_batches_at_once=3, token_budget=180) for _ in range(2)]
    assert len(beside[0].trainer._share_out(_rows(beside[0]))) == 3
    for other in (cut, *beside):
        assert losses(other) == pytest.approx(losses(whole), rel=2e-4)
        assert adapter_sum(other) == pytest.approx(adapter_sum(whole), rel=2e-3)
    assert all(torch.equal(weight, beside[1].weights()[key]) for key, weight in beside[0].weights().items())


def _rows(run: Any) -> list[Row]:
    """Those of the first ten samples."""
    return [row for place in range(10) for row in run.trainer.train_dataset[place]]


@pytest.mark.parametrize("name", ["asft", "smoothed"])
def test_evaluation_is_plain_cross_entropy(name: str, bench: Bench) -> None:
    base = {"val_size": 6, "learning_rate": 0.0, "max_steps": 1}
    plain, other = bench.once(**base), bench.train(**base, **SWITCHES[name])
    assert other.column("eval_loss") == plain.column("eval_loss")
    assert losses(other) != losses(plain)


@pytest.mark.parametrize("tuning", [{}, {"finetuning_type": "full"}], ids=str)
def test_asft_holds_to_the_start(tuning: dict[str, Any], bench: Bench) -> None:
    """Nothing is apart in the first step, so it is DFT's; in the second it is DFT's and the divergence, of the two models themselves."""
    base = {**tuning, "max_steps": 2, "learning_rate": 0.02, "disable_shuffling": True, "save_strategy": "steps", "save_steps": 1}
    free, held = (bench.train(**base, **more) for more in ({"use_dft_loss": True}, {"use_asft_loss": True, "asft_alpha": 0.5}))
    assert losses(held)[0] == pytest.approx(losses(free)[0], abs=1e-6)
    start = load_model(bench.tiny_model, torch.float32, False)
    run = Run.from_dict(bench.keys(**tuning, learning_rate=0.0))
    first = held.folder / "checkpoint-1"
    then = run.adapter.merge(start, [first]) if run.adapter.takes_adapters else load_model(first, torch.float32, False)
    apart = _divergence(load_model(bench.tiny_model, torch.float32, False), then, _rows(held)[4:8])
    assert apart > 1e-3
    assert losses(held)[1] - losses(free)[1] == pytest.approx(0.5 * apart, rel=2e-2)


def _divergence(start: Any, end: Any, rows: Sequence[Row]) -> float:
    """KL(start || end), the mean over learnt tokens."""
    batch = pad(rows)
    learnt = batch.pop("labels")[:, 1:] >= 0
    with torch.no_grad():
        wanted, found = (torch.log_softmax(one.eval()(**batch, use_cache=False).logits[:, :-1][learnt], -1) for one in (start, end))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_a_resumed_run_is_held_to_the_same_start(bench: Bench) -> None:
    base = {"use_asft_loss": True, "asft_alpha": 5.0, "finetuning_type": "full", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = bench.train(**base, learning_rate=0.02)
    rest = bench.train(**base, learning_rate=0.02, resume_from_checkpoint=str(whole.folder / "checkpoint-2"))
    assert losses(rest) == losses(whole)[2:]


def test_only_one_loss_at_a_time(bench: Bench) -> None:
    assert "'use_dft_loss' and 'use_asft_loss' exclude each other" in bench.train(use_dft_loss=True, use_asft_loss=True).complaint
    assert "'use_eaft_loss' and 'label_smoothing_factor'" in bench.train(use_eaft_loss=True, label_smoothing_factor=0.1).complaint
    assert "'eaft_alpha' has no effect without 'use_eaft_loss'" in bench.train(eaft_alpha=2.0).said


# ------------------------------------------------------------------ noise


def noisy_model(tiny_model: Path, alpha: float) -> tuple[Any, list[Tensor]]:
    """The model, and the embeddings of each forward pass."""
    model = load_model(tiny_model, torch.float32, False)
    teach(model)
    METHODS["sft"](METHODS["sft"].Options(), LearningOptions.model_validate({"neftune_noise_alpha": alpha})).attach(model)
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: seen.append(output.detach()))
    return model, seen


@pytest.mark.parametrize("collate", [lay, pad])
def test_noise_goes_by_each_rows_own_length(collate: Callable[[Sequence[Row]], dict[str, Any]], tiny_model: Path) -> None:
    model, seen = noisy_model(tiny_model, 5.0)
    rows = [Row(ids := np.full(n, 7, np.int32), ids) for n in (64, 4, 16)]
    batch = collate(rows)
    labels = batch.pop("labels")
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        batch.pop(name, None)
    model.train()(targets=labels, **batch)
    model.eval()(targets=labels, **batch)
    apart = (seen[0] - seen[1]).abs()
    starts = [(0, 0), (0, 64), (0, 68)] if collate is lay else [(0, 0), (1, 0), (2, 0)]
    for (row, start), length in zip(starts, (64, 4, 16), strict=True):
        most, limit = float(apart[row, start : start + length].max()), 5.0 / math.sqrt(length * 32)
        assert 0.9 * limit < most <= limit * 1.0001
    assert torch.equal(seen[1], nn.functional.embedding(batch["input_ids"], model.get_input_embeddings().weight))


def test_noise_leaves_no_trace(bench: Bench) -> None:
    """Files are as without it, transformers' own noise stays off, and a resumed run draws the same dice."""
    base = {"neftune_noise_alpha": 10.0, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "val_size": 4}
    whole = bench.train(**base)
    rest = bench.train(**base, resume_from_checkpoint=str(whole.folder / "checkpoint-1"))
    assert losses(rest) == losses(whole)[1:]
    assert rest.column("eval_loss") == whole.column("eval_loss")
    assert all(torch.equal(weight, rest.weights()[name]) for name, weight in whole.weights().items())
    assert whole.weights().keys() == bench.once().weights().keys()
    assert whole.trainer.args.neftune_noise_alpha is None


# ------------------------------------------------------------------ mixtures of experts


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_routers_are_balanced_as_transformers_does(kind: str, chunks: bool, tmp_path: Path) -> None:
    """One micro-batch: the mean of the cross entropy plus coefficient times loss, and the gradient of the routers."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    if kind == "mixtral":
        model = load_model(build_experts(tmp_path / "model"), torch.float32, False)
    else:
        shape = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3, "head_dim": 8}
        more = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3, "mlp_only_layers": [1]}
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(vocab_size=90, decoder_sparse_step=1, **shape, **more))
    model.train()
    batch = pad([Row(ids := torch.randint(1, 80, (n,)).numpy().astype(np.int32), ids) for n in (12, 7)])
    labels = batch.pop("labels")
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.5
    wanted = model(**batch, labels=labels, output_router_logits=True, use_cache=False).loss
    wanted.backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    METHODS["sft"](METHODS["sft"].Options(), LearningOptions.model_validate({"moe_aux_loss_coef": 0.5})).attach(model)
    if chunks:
        from finery.models.kernels.base import Patches

        assert KERNELS["head_loss"](KERNELS["head_loss"].Options()).apply(model, Patches())
    teach(model)
    count = (labels[:, 1:] >= 0).sum()
    ours = model(**batch, targets=labels) / count
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    routers = [name for name in theirs if name.endswith("gate.weight")]
    assert len(routers) == 2 and all(float(theirs[name].abs().sum()) > 0 for name in routers)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name], rtol=1e-3, atol=1e-6), name
    model.eval()
    assert float(model(**batch, targets=labels).detach() / count) < float(ours.detach()) - 0.5, "evaluation is cross entropy alone"


def test_routers_and_reentrant_recomputation(bench: Bench) -> None:
    complaint = bench.train(moe_aux_loss_coef=0.1, use_reentrant_gc=True).complaint
    assert "'moe_aux_loss_coef' would not reach the routers with 'use_reentrant_gc'" in complaint


# ------------------------------------------------------------------ random weights, recomputation


def test_weights_from_scratch_come_from_the_seed(bench: Bench) -> None:
    base = {"train_from_scratch": True, "finetuning_type": "full", "learning_rate": 0.0, "max_steps": 1, "disable_shuffling": True}
    first, other = (bench.train(**base, seed=seed) for seed in (1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [run.weights("model.safetensors")[name] for run in (first, other)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], load_model(bench.tiny_model, torch.float32, False).state_dict()[name])
    assert json.loads((first.folder / "config.json").read_text())["hidden_size"] == 32
    assert "needs all weights to be saved" in bench.train(train_from_scratch=True).complaint


def test_weights_from_scratch_need_none_in_the_folder(bench: Bench) -> None:
    """A resumed run goes on with those that it began with."""
    import shutil

    bare = shutil.copytree(bench.tiny_model, bench.tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    base = {"model_name_or_path": str(bare), "finetuning_type": "full", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = bench.train(**base, train_from_scratch=True)
    rest = bench.train(**base, train_from_scratch=True, resume_from_checkpoint=str(whole.folder / "checkpoint-2"))
    assert losses(rest) == losses(whole)[2:]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_of_both_kinds_trains_the_same(reentrant: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    plain = bench.train(micro_batches_at_once=1)
    other = bench.train(gradient_checkpointing=True, use_reentrant_gc=reentrant)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)
    assert adapter_sum(other) == pytest.approx(adapter_sum(plain), rel=1e-5)
    assert other.trainer.lanes.most == (1 if reentrant else 2)
    assert "works on one micro-batch" in bench.train(use_reentrant_gc=True, micro_batches_at_once=2).complaint


# ------------------------------------------------------------------ 8-bit floating point


@pytest.mark.parametrize(("capability", "able"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_fp8_asks_the_device(capability: tuple[int, int], able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    options, device = fp8.Fp8Options(fp8=True), torch.device("cuda", 0)
    if able:
        fp8.check_device(options, device)
        return
    with pytest.raises(UserError, match=r"'fp8' needs a GPU with compute capability 8\.9 or more .* this one has 8\.0"):
        fp8.check_device(options, device)


def test_fp8_serves_large_layers_alone() -> None:
    assert fp8.is_served(nn.Linear(64, 32), "model.layers.0.mlp.up_proj")
    assert not fp8.is_served(nn.Linear(64, 30), "model.layers.0.mlp.up_proj")
    assert not fp8.is_served(nn.Linear(64, 16), "model.layers.0.mlp.up_proj.lora_A.default")
    assert not fp8.is_served(nn.Linear(64, 640), "lm_head")
    assert not fp8.is_served(nn.LayerNorm(64), "model.norm")


def test_fp8_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "have", lambda package: False)
    with pytest.raises(UserError, match="'fp8_backend: te' needs a package that is not installed: pip install transformer-engine"):
        fp8.recipe(fp8.Fp8Options(fp8=True, fp8_backend="te"))


def test_fp8_steps_around_kernels_with_products_of_their_own(bench: Bench) -> None:
    run = Run.from_dict(bench.keys(fp8=True))
    kernels = fp8.without_others(run.switched["kernel"], run.fp8)
    off = {name for name, given in kernels.items() if given != run.switched["kernel"][name]}
    assert off == {"lora_linear", "mixed_linear"}
    assert "'fp8' and 'quantization_bit' exclude each other" in bench.train(fp8=True, quantization_bit=4).complaint


@pytest.mark.parametrize("tuning", [{}, {"finetuning_type": "full"}], ids=str)
def test_fp8_trains_through_torchao(tuning: dict[str, Any], bench: Bench) -> None:
    """torch computes such products on a CPU, too, if slowly: every linear layer of the stack does so, and the loss stays near."""
    called: set[str] = set()
    bench.patch.setattr("finery.training.session.check_device", lambda options, device: None)
    from torchao.float8.float8_linear import Float8Linear

    forward = Float8Linear.forward

    def counted(layer: Any, x: Tensor) -> Tensor:
        called.add(str(id(layer)))
        return forward(layer, x)

    bench.patch.setattr(Float8Linear, "forward", counted)
    run, plain = bench.train(**tuning, fp8=True, fp8_backend="torchao"), bench.train(**tuning)
    assert not run.complaint
    assert (run.trainer.args.mixed_precision, len(called)) == ("fp8", 14)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-2) and losses(run) != losses(plain)
    name = "model.safetensors" if tuning else "adapter_model.safetensors"
    assert run.weights(name).keys() == plain.weights(name).keys()
