"""The native step gives what the model gives, and for each row the bits that it gives alone; what it does not serve goes the plain way."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finery.engines.functions import native_decoder
from finery.engines.functions.batch import Batch
from finery.engines.functions.native_step import NativeStep, find_native_step, is_right, refusal
from finery.engines.functions.rows import RowCache
from finery.models.kernels import native

pytestmark = pytest.mark.skipif(not native.serves(torch.zeros(1)), reason="needs a C compiler")

VOCABULARY = 101  # no multiple of a panel's width
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 42, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "every head its own": ("llama", {"num_key_value_heads": 6, "head_dim": 64}),
    "one head for all": ("llama", {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "stretched positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "window": ("mistral", {"sliding_window": 8}),
    "windows in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("phi3", {"sliding_window": None}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
}  # fmt: skip


def build(kind: str = "llama", exact: bool = False, **changes: Any) -> Any:
    """A random model whose biases and norms are no zeros and ones; `exact`: bf16 holds its weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes)), dtype=torch.float32).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
            if exact:
                value.copy_(value.bfloat16())
    return model


def texts(*lengths: int) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, VOCABULARY, (1, length), generator=dice) for length in lengths]


@torch.no_grad()
def plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, -1]


@torch.no_grad()
def scores(step: NativeStep, prompts: list[torch.Tensor], chunk: int = 1000, num_steps: int = 3) -> torch.Tensor:
    """Scores (steps, R, V): prompts are read, all but the last tokens, and those are fed one by one to all rows."""
    joined = RowCache(step.model.config)
    own = []
    for ids in prompts:
        own.append(RowCache(step.model.config))
        own[-1].lengths = [0]
        for part in ids[:, :-num_steps].split(chunk, 1):
            step([(own[-1], part)])
    for cache in own:
        joined.join(cache)
    return torch.stack([step([(joined, torch.cat([ids[:, ids.shape[1] - n, None] for ids in prompts]))]) for n in range(num_steps, 0, -1)])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_models_own(kind: str, exact: bool) -> None:
    """Rows of many lengths, beyond windows and the cache's first columns."""
    name, changes = KINDS[kind]
    model = build(name, exact, **changes)
    step = find_native_step(model)
    assert step is not None
    prompts = texts(5, 300, 17, 4, 30)
    found = scores(step, prompts)
    for row, ids in enumerate(prompts):
        for n in range(3):
            wanted = plain(model, ids[:, : ids.shape[1] - 2 + n])[0]
            assert torch.allclose(found[n, row], wanted, atol=2e-4 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 13, 30])
def test_a_row_does_not_see_the_others(count: int) -> None:
    """Nor whether its prompt was read at once, or how many threads there are."""
    step = NativeStep(build(head_dim=36, exact=count % 2 == 0))
    prompts = texts(*range(5, 5 + count))
    together = scores(step, prompts)
    for row, ids in enumerate(prompts):
        assert torch.equal(together[:, row], scores(step, [ids], chunk=3)[:, 0])
    try:
        torch.set_num_threads(3)
        assert torch.equal(together, scores(step, prompts))
    finally:
        torch.set_num_threads(1)


def test_more_tokens_than_pass_over_a_panel_at_once() -> None:
    """Prompts and a row's next token in one call are what they are one by one."""
    step = NativeStep(build())
    first, second, third = texts(150, 140, 9)
    caches = [RowCache(step.model.config) for _ in range(6)]
    for cache in caches:
        cache.lengths = [0]
    step([(caches[0], third)])
    step([(caches[3], third)])
    together = step([(caches[0], third[:, :1]), (caches[1], first), (caches[2], second)])
    alone = [step([part]) for part in ((caches[3], third[:, :1]), (caches[4], first), (caches[5], second))]
    assert torch.equal(together, torch.cat(alone))


def test_bf16_is_computed_in_fp32() -> None:
    """The result is that of the same weights in fp32, which the model's own products, rounded to bf16, come near."""
    wide = build(exact=True)
    model = build()
    model.load_state_dict(wide.state_dict())
    for value in model.parameters():
        value.data = value.data.bfloat16()
    step = find_native_step(model)
    assert step is not None
    assert torch.equal(scores(step, texts(6, 9)), scores(NativeStep(wide), texts(6, 9)))


def test_numbers_that_are_none_stay_in_their_row() -> None:
    model = build()
    model.model.embed_tokens.weight.data[7] = float("nan")
    found = scores(NativeStep(model), [torch.tensor([[7, 1, 2, 3]]), torch.tensor([[1, 2, 3, 4, 5]])])
    assert bool(found[:, 0].isnan().all()) and bool(found[:, 1].isfinite().all())


def refused(case: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that the native step must leave alone."""
    from peft import LoraConfig, get_peft_model

    model = build({"other kind": "cohere", "more than keys and values": "mamba"}.get(case, "llama"))
    if case == "adapters":
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    if case == "adapters in it":
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"])).base_model.model
    if case == "updates beside it":
        model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    if case == "patched":
        model.model.layers[1].mlp.forward = lambda x: x
    if case == "fp16":
        return model.half()
    if case == "rotation by length":
        return build(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    if case == "activation":
        return build(hidden_act="relu")
    if case == "memory":
        monkeypatch.setattr(native_decoder, "free_bytes", lambda device: 1000)
    return model


CASES = (
    "adapters", "adapters in it", "updates beside it", "patched", "fp16", "rotation by length", "activation", "memory", "other kind",
    "more than keys and values",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_it_does_not_serve_goes_the_plain_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not refusal(build())
    model = refused(case, monkeypatch)
    assert refusal(model)
    assert find_native_step(model) is None


def test_one_that_does_not_give_the_same_is_not_used() -> None:
    """Here the config says another thing than the layers do."""
    model = build(hidden_size=96)
    step = NativeStep(model)
    assert is_right(model, step)
    model.config.rms_norm_eps = 0.1
    assert not refusal(model) and not is_right(model, NativeStep(model))
    batch = Batch(model, 512)
    assert batch.native is None and batch.way == "together"
    assert "forward" in model.lm_head.__dict__, "the function for few rows serves instead"


def test_a_cache_makes_room_for_rows_by_doubling() -> None:
    step = NativeStep(build())
    joined = RowCache(step.model.config)
    for ids in texts(4, 5, 6, 7, 8):
        own = RowCache(step.model.config)
        own.lengths = [0]
        step([(own, ids)])
        joined.join(own)
    assert [len(layer.keys) for layer in joined.held] == [8] * 3  # type: ignore[arg-type]
    assert joined.lengths == [4, 5, 6, 7, 8]


def test_scores_are_as_many_as_the_head_gives_whatever_it_says() -> None:
    """Heads that have grown with the vocabulary may say that they are as large as before: there would be room for too few."""
    model = build()
    model.lm_head.out_features = 10
    step = find_native_step(model)
    assert step is not None
    assert _scores(step).shape == (1, VOCABULARY)


def _scores(step: NativeStep) -> torch.Tensor:
    cache = RowCache(step.model.config)
    cache.lengths = [0]
    return step([(cache, texts(5)[0])])


@pytest.mark.parametrize("path", ["self_attn.o_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.gate_proj"])
def test_weights_of_other_sizes_than_the_config_tells_are_left_to_the_model(path: str) -> None:
    model = build()
    layer = model.model.layers[1].get_submodule(path)
    layer.weight = torch.nn.Parameter(torch.zeros(layer.out_features + 1, layer.in_features))
    with pytest.raises((ValueError, RuntimeError)):
        NativeStep(model)
