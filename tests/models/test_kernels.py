"""Every kernel against the model's own way of computing: losses and gradients, over families, shapes and rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finery.data.rows.base import IGNORED, Row, lay, pad
from finery.models.adapters.lora import LoRA
from finery.models.head import bare, teach
from finery.models.kernels import KERNELS, native
from finery.models.kernels.base import Patches
from finery.training.choices import Choices
from finery.training.fast import make_fast

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_odd_heads": {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "hidden_size": 36},
    "llama_no_groups": {"model_type": "llama", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama_gelu": {"model_type": "llama", "hidden_act": "gelu_pytorch_tanh"},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}
"""Configs of tiny models, beside the settings that all have."""
COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ROWS: dict[str, Sequence[int]] = {"one": [11], "one token": [2], "many": [9, 1, 14, 2, 5]}
PLACES = {  # in a tiny llama of two layers with LoRA on all linear layers
    "gated_mlp": 2, "head_loss": 1, "lora_linear": 14, "packed_attention": 2, "rms_norm": 5, "rotary": 2,
}  # fmt: skip


def build(family: str, adapter: str = "full", **lora: Any) -> Any:
    """A tiny random model; norms and adapters are no identities."""
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = dict(FAMILIES[family])
    config = AutoConfig.for_model(changes.pop("model_type", family), **(COMMON | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data += torch.randn_like(weight) * 0.2
        elif "embed" not in name:
            weight.data *= 3
    if adapter == "lora":
        model = LoRA(LoRA.Options(**lora)).apply(model)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.3)
    return model.train()


def rows_of(lengths: Sequence[int], vocabulary: int = 97) -> list[Row]:
    dice = np.random.default_rng(3)
    made = []
    for length in lengths:
        ids = dice.integers(1, vocabulary, length).astype(np.int32)
        made.append(Row(ids, np.where(dice.random(length) < 0.7, ids, IGNORED).astype(np.int32)))
    return made


def losses_and_gradients(model: Any, batches: Sequence[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums over the batches."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        loss = model(**inputs, targets=batch["labels"])
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model: Any, rows: Sequence[Row]) -> tuple[Tensor, dict[str, Tensor]]:
    teach(bare(model))
    return losses_and_gradients(model, [pad([row]) for row in rows])


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], rel: float = 1e-4) -> None:
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=rel, abs=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    # some are nothing but rounding (the key's bias moves no softmax), so the greatest of all is the measure
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        assert torch.allclose(ours[1][name], gradient, rtol=rel, atol=rel * max(float(gradient.abs().max()), largest / 100)), name


def options(**changes: Any) -> dict[str, Any]:
    """Options of all kernels, changed by key."""
    return {
        name: KERNELS[name].Options(**{key: value for key, value in changes.items() if key in KERNELS[name].Options.model_fields})
        for name in KERNELS.names()
    }


@pytest.fixture(params=["built", "torch alone"])
def native_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the functions in C, and where there is no compiler."""
    if request.param == "torch alone":
        monkeypatch.setattr(native, "_library", lambda: None)
    yield request.param


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_kernels_together_give_what_the_model_gives(family: str, adapter: str) -> None:
    model = build(family, adapter)
    rows = rows_of(ROWS["many"])
    wanted = plain(model, rows)
    fast = make_fast(model, options(), Choices({}), None)
    assert fast.end_to_end, fast.left
    assert_same(losses_and_gradients(model, [lay(rows)]), wanted)


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize("family", ["llama", "llama_odd_heads", "mistral"])
def test_rows_of_all_lengths(family: str, lengths: str, native_or_not: str) -> None:
    model = build(family, "lora")
    rows = rows_of(ROWS[lengths])
    wanted = plain(model, rows)
    fast = make_fast(model, options(), Choices({}), None)
    assert fast.end_to_end, fast.left
    assert ("rms_norm" in fast.places) == (native_or_not == "built")
    assert_same(losses_and_gradients(model, [lay(rows)]), wanted)


@pytest.mark.parametrize("name", PLACES)
def test_a_kernel_alone(name: str) -> None:
    """It serves where it should, can be taken away again, and its key alone switches it off."""
    model = build("llama", "lora")
    rows = rows_of(ROWS["many"])
    wanted = plain(model, rows)
    kernel, patches = KERNELS[name](KERNELS[name].Options()), Patches()
    assert kernel.fits(bare(model)) == ""
    assert kernel.apply(bare(model), patches) == PLACES[name]
    assert_same(losses_and_gradients(model, [lay(rows)] if name == "packed_attention" else [pad(rows)]), wanted)
    patches.undo()
    teach(bare(model))
    assert_same(plain(model, rows), wanted, rel=1e-7)
    fast = make_fast(model, options(**{KERNELS[name].switch: False}), Choices({}), None)
    assert fast.left[name] == "switched off"
    assert set(PLACES) - set(fast.places) == {name}


def test_blocks_of_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are done in several blocks of queries, with a window that begins within one."""
    from finery.models.kernels.functions import packed_attention

    monkeypatch.setattr(packed_attention, "MOST_SCORES", 64)
    for window in (200, 70):
        dice = torch.Generator().manual_seed(1)
        tensors = [torch.randn(1, heads, 200, 8, generator=dice, requires_grad=True) for heads in (6, 2, 2)]
        seed = torch.randn(1, 200, 6, 8, generator=dice)
        results = []
        for function in (packed_attention.attend, packed_attention.attend_by_sdpa):
            starts = torch.tensor([0, 130, 131, 200], dtype=torch.int32)
            out, _ = function(torch.nn.Identity(), *tensors, sliding_window=window, cu_seq_lens_q=starts)
            results.append((out, *torch.autograd.grad((out * seed).sum(), tensors)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.4}, {"lora_rank": 3, "lora_alpha": 7}, {"lora_target": ("q_proj", "down_proj")}])
def test_lora_is_what_peft_computes(lora: dict[str, Any]) -> None:
    """Dropout included: the same dice are drawn in the same order."""
    model = build("llama", "lora", **lora)
    rows = rows_of(ROWS["many"])
    teach(bare(model))
    torch.manual_seed(5)
    wanted = losses_and_gradients(model, [pad(rows)])
    kernel = KERNELS["lora_linear"](KERNELS["lora_linear"].Options())
    kernel.apply(bare(model), Patches())
    torch.manual_seed(5)
    assert_same(losses_and_gradients(model, [pad(rows)]), wanted)


def test_lora_steps_aside_where_the_adapter_is_off() -> None:
    model = build("llama", "lora")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        KERNELS["lora_linear"](KERNELS["lora_linear"].Options()).apply(bare(model), Patches())
        assert torch.allclose(model(input_ids=ids).logits, on, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, off)


def test_half_precision_stays_near() -> None:
    """bf16 with all kernels against fp32 by the model's own code."""
    rows = rows_of(ROWS["many"])
    loss, _ = plain(build("llama", "lora"), rows)
    model = build("llama", "lora")
    bare(model).to(torch.bfloat16)
    fast = make_fast(model, options(), Choices({}), torch.bfloat16)
    assert fast.end_to_end, fast.left
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = losses_and_gradients(model, [lay(rows)])
    assert float(half) == pytest.approx(float(loss), rel=2e-2)


@pytest.mark.parametrize("family", ["llama", "llama_no_groups", "qwen3", "olmo2", "gpt2"])
def test_full_training_in_mixed_precision(family: str) -> None:
    """fp32 weights, bf16 products: nearly what autocast gives alone, with each weight rounded once a step."""
    model = build(family)
    rows = rows_of(ROWS["many"])
    with torch.autocast("cpu", torch.bfloat16):
        wanted = plain(model, rows)
        fast = make_fast(model, options(), Choices({}), torch.bfloat16)
        ours = losses_and_gradients(model, [lay(rows)])
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear and m is not model.get_output_embeddings()]
    assert fast.end_to_end and fast.places.get("mixed_linear", 0) == len(linear), fast.left
    assert float(ours[0]) == pytest.approx(float(wanted[0]), rel=1e-2)
    norm = torch.cat([gradient.flatten() for gradient in wanted[1].values()]).norm()
    apart = torch.cat([(ours[1][name] - gradient).flatten() for name, gradient in wanted[1].items()]).norm()
    assert apart < 0.05 * norm
    assert all(gradient.dtype == torch.float32 for gradient in ours[1].values())


def test_copies_of_weights_are_never_old() -> None:
    from finery.models.kernels.functions.mixed_linear import Copies

    copies, weight = Copies(), torch.nn.Parameter(torch.ones(2, 2))
    first = copies.of(weight, torch.bfloat16)
    assert copies.of(weight, torch.bfloat16) is first
    with torch.no_grad():
        weight.add_(1)
    assert float(copies.of(weight, torch.bfloat16)[0, 0]) == 2
    weight.data.add_(1)  # unseen by torch's count of changes, hence the trainer's `clear` before an optimizer's step
    copies.clear()
    assert float(copies.of(weight, torch.bfloat16)[0, 0]) == 3


def test_the_head_keeps_no_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few tokens give the same; evaluation computes no gradient."""
    from finery.models.kernels.functions import head_loss

    model = build("llama")
    rows = rows_of([20, 13])
    wanted = plain(model, rows)
    sizes: list[int] = []
    chunk = head_loss._chunk

    def watched(logits: Tensor, target: Tensor, wants_gradient: bool, shape: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(logits) if wants_gradient else -len(logits))
        return chunk(logits, target, wants_gradient, shape)

    monkeypatch.setattr(head_loss, "_chunk", watched)
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 1)
    make_fast(model, options(), Choices({"packed_attention": None}), None)
    sizes.clear()
    assert_same(losses_and_gradients(model, [lay(rows)]), wanted)
    assert sizes and all(0 < size <= 16 for size in sizes)
    sizes.clear()
    with torch.no_grad():
        batch = lay(rows)
        assert float(model(targets=batch.pop("labels"), **batch)) == pytest.approx(float(wanted[0]), rel=1e-5)
    assert sizes and all(size < 0 for size in sizes)


def leaking(*tensors: Any, **how: Any) -> Any:
    """Attention in which rows see those before them."""
    from finery.models.kernels.functions.packed_attention import attend_by_sdpa

    how.pop("cu_seq_lens_q", None)
    return attend_by_sdpa(*tensors, **how)


@pytest.mark.parametrize("half", [False, True])
def test_a_trial_finds_rows_that_see_each_other(half: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from finery.models.kernels.functions import packed_attention

    monkeypatch.setattr(packed_attention, "attend", leaking)
    monkeypatch.setattr("finery.training.fast.log.warning", lambda text, *given: caplog.records.append(text % given))  # type: ignore[arg-type]
    model = build("llama", "lora")
    if half:
        bare(model).to(torch.bfloat16)
    rows = rows_of(ROWS["many"])
    wanted = plain(model, rows)
    choices = Choices({})
    fast = make_fast(model, options(), choices, torch.bfloat16 if half else None)
    assert not fast.end_to_end and not choices["packed_attention"]
    assert "a trial of the first layers" in fast.left["packed_attention"]
    assert "rows are padded" in str(caplog.records[0])
    if not half:
        assert_same(losses_and_gradients(model, [pad(rows)]), wanted)


def test_a_trial_takes_wrong_kernels_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that computes something else than the module is not relied on."""
    from finery.models.kernels.functions import lora_linear

    compute = lora_linear._compute
    monkeypatch.setattr(lora_linear, "_compute", lambda layers, x: tuple(1.3 * y for y in compute(layers, x)))
    model = build("llama", "lora")
    rows = rows_of(ROWS["many"])
    wanted = plain(model, rows)
    fast = make_fast(model, options(), Choices({}), None)
    assert not fast.places
    assert_same(losses_and_gradients(model, [pad(rows)]), wanted)
