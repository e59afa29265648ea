"""Scaled positions: the published formulas, rows that do not depend on their neighbours, and the same positions wherever a model serves."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from conftest import build_model
from finery.commands.export import export
from finery.data.rows.base import Row, lay, pad
from finery.errors import UserError
from finery.models.head import teach
from finery.models.rope import Rope, longest, original_length, scale_row_by_row, to_serve, to_train
from finery.models.trained import find_trained, load_answering
from finery.run import Run
from watched import Bench

BASE, DIM, MADE_FOR = 10_000.0, 64, 512
PLAIN = BASE ** -(np.arange(0, DIM, 2) / DIM)


def config_of(**changes: Any) -> Any:
    shape: dict[str, Any] = {"hidden_size": 4 * DIM, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    shape |= {"intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": MADE_FOR}
    return LlamaConfig(**{**shape, **changes})


def by_transformers(kind: str, factor: float) -> tuple[np.ndarray, float]:
    config = config_of()
    Rope(kind, factor).set(config)
    module = LlamaRotaryEmbedding(config)
    return module.inv_freq.double().numpy(), module.attention_scaling


def linear(s: float) -> np.ndarray:
    return PLAIN / s


def yarn(s: float) -> np.ndarray:
    """Between the number that turns 32 times in the old length, and the one that turns once, by place (the authors' own code)."""

    def place(turns: float) -> float:
        return DIM * math.log(MADE_FOR / (turns * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), DIM - 1)
    kept = 1 - np.clip((np.arange(DIM // 2) - low) / (high - low), 0, 1)
    return PLAIN / s * (1 - kept) + PLAIN * kept


def llama3(s: float) -> np.ndarray:
    """By wave length: above L the frequency is divided, below L / 4 it stays, between it goes from one to the other."""
    found = []
    for frequency in PLAIN:
        turns = MADE_FOR * frequency / (2 * math.pi)
        share = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        found.append((1 - share) * frequency / s + share * frequency)
    return np.array(found)


@pytest.mark.parametrize("factor", [2.0, 8.0])
@pytest.mark.parametrize("formula", [linear, yarn, llama3])
def test_frequencies_are_the_published_ones(formula: Callable[[float], np.ndarray], factor: float) -> None:
    found, scale = by_transformers(formula.__name__, factor)
    assert found == pytest.approx(formula(factor), rel=1e-5)
    assert found[0] == pytest.approx(PLAIN[0] / (factor if formula is linear else 1))
    assert found[-1] == pytest.approx(PLAIN[-1] / factor)
    assert scale == pytest.approx(0.1 * math.log(factor) + 1 if formula is yarn else 1.0)


def test_dynamic_frequencies_grow_with_each_row() -> None:
    """Beside transformers' own for a row alone, and the formula; a row that fits is not touched."""
    config = config_of(max_position_embeddings=16)
    Rope("dynamic", 4.0).set(config)
    module = LlamaRotaryEmbedding(config)
    holder = torch.nn.ModuleList([module])
    alone = {n: LlamaRotaryEmbedding(config)(torch.zeros(1, n, 4), torch.arange(n)[None]) for n in (40, 9)}
    assert scale_row_by_row(holder) == 1
    for n, (cos, sin) in alone.items():
        base = BASE * (4.0 * max(n, 16) / 16 - 3.0) ** (DIM / (DIM - 2))
        angles = np.arange(n)[:, None] * base ** -(np.arange(0, DIM, 2) / DIM)
        assert cos[0, :, : DIM // 2].numpy() == pytest.approx(np.cos(angles), abs=1e-4)
        ours = module(torch.zeros(1, n, 4), torch.arange(n)[None])
        assert torch.allclose(ours[0], cos, atol=1e-5) and torch.allclose(ours[1], sin, atol=1e-5)


@pytest.mark.parametrize("collate", [lay, pad])
def test_dynamic_rows_do_not_see_their_neighbours_lengths(collate: Callable[..., dict[str, Any]]) -> None:
    config = config_of(max_position_embeddings=8, attn_implementation="eager" if collate is pad else "sdpa")
    Rope("dynamic", 4.0).set(config)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = [torch.randint(1, 64, (n,)).numpy().astype(np.int32) for n in (30, 6, 17)]
    rows = [Row(row, row) for row in ids]
    with torch.no_grad():
        wanted = 0.0
        for row in ids:  # transformers' own frequencies, each row alone and afresh
            fresh = LlamaForCausalLM(config).eval()
            fresh.load_state_dict(model.state_dict())
            given = torch.from_numpy(row.astype(np.int64))[None]
            wanted += float(fresh(input_ids=given, labels=given, use_cache=False).loss) * (len(row) - 1)
        scale_row_by_row(model)
        teach(model)
        batch = collate(rows)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            batch.pop(name, None)  # transformers' attention reads where positions begin anew
        assert float(model(targets=batch.pop("labels"), **batch)) == pytest.approx(wanted, rel=1e-5)


def test_the_factor_is_the_smallest_whole_one() -> None:
    assert to_train("yarn", 512, config_of()) is None
    assert [to_train("yarn", n, config_of()) for n in (513, 1024, 1025)] == [Rope("yarn", 2.0), Rope("yarn", 2.0), Rope("yarn", 3.0)]
    for kind in ("linear", "dynamic", "yarn", "llama3"):  # what is scaled once is scaled from the beginning when it is again
        config = config_of()
        Rope(kind, 4.0).set(config)
        assert (longest(config), original_length(config)) == (2048, 512)
        assert to_train(kind, 2048, config) is None
        assert to_train(kind, 4000, config) == Rope(kind, 8.0)
        config.validate_rope()


def test_layers_with_a_window_keep_their_positions() -> None:
    config: Any = Gemma3TextConfig(max_position_embeddings=512, num_hidden_layers=6)
    before = dict(config.rope_parameters["sliding_attention"])
    theta = config.rope_parameters["full_attention"]["rope_theta"]
    Rope("linear", 4.0).set(config)
    assert config.rope_parameters["sliding_attention"] == before
    assert config.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": theta}
    with pytest.raises(UserError, match="'rope_scaling: dynamic' serves no model whose layers differ"):
        Rope("dynamic", 4.0).set(config)


def test_a_model_without_rotary_positions() -> None:
    with pytest.raises(UserError, match="'rope_scaling': a model of type 'gpt2' has no rotary positions"):
        to_train("yarn", 4096, GPT2Config())


def test_a_model_that_no_run_has_trained() -> None:
    config = config_of()
    to_serve("yarn", config)
    assert config.rope_parameters["factor"] == 2.0
    to_serve("linear", config)
    assert config.rope_parameters["rope_type"] == "yarn"
    plain = config_of()
    to_serve(None, plain)
    assert plain.rope_parameters == config_of().rope_parameters


# ------------------------------------------------------------------ trained = served


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("short") / "model", max_position_embeddings=40)


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    def of_short(**changes: Any) -> dict[str, Any]:
        return keys(**{"model_name_or_path": str(short_model), **changes})

    return Bench(of_short, data_dir, short_model, tmp_path, monkeypatch)


def positions(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["rope_parameters"]


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_an_adapter_is_served_with_the_positions_it_was_trained_with(kind: str, bench: Bench) -> None:
    """cutoff_len 128 in a model of 40 positions: 4. The key's own factor for models that no run has trained would be 2."""
    done = bench.train(rope_scaling=kind)
    assert not done.complaint
    trained = done.trainer.model.config.rope_parameters
    assert (trained["rope_type"], trained["factor"]) == (kind, 4.0)
    assert f'rope_scaling: "{kind}"  # decided: factor 4' in (done.folder / "run.yaml").read_text()
    wanted = done.trainer.model.get_base_model().model.rotary_emb.original_inv_freq
    for asked in ({"adapter_name_or_path": str(done.folder)}, {"output_dir": str(done.folder), "rope_scaling": kind, "cutoff_len": 999}):
        run = Run.from_dict(bench.keys(**asked))
        served = load_answering(
            find_trained(run.model, run.adapter, run.loop.output_dir), run.adapter, _tokenizer(bench), run.model, None, torch.device("cpu")
        )
        assert served.config.rope_parameters == trained
        assert torch.equal(served.model.rotary_emb.inv_freq, wanted)
    merged = export(Run.from_dict(bench.keys(output_dir=str(done.folder))))
    assert positions(merged) == trained


def _tokenizer(bench: Bench) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(bench.tiny_model))


def test_whole_models_are_saved_with_their_positions(bench: Bench) -> None:
    done = bench.train(rope_scaling="yarn", finetuning_type="full")
    assert positions(done.folder)["factor"] == 4.0
    again = bench.train(model_name_or_path=str(done.folder), rope_scaling="yarn", finetuning_type="full")
    assert positions(again.folder) == positions(done.folder)
    assert "fits into the 160 positions" in again.said


def test_an_adapter_that_is_gone_on_with_keeps_its_positions(bench: Bench) -> None:
    first = bench.train(rope_scaling="yarn")
    second = bench.train(adapter_name_or_path=str(first.folder))
    assert second.trainer.model.config.rope_parameters["factor"] == 4.0
    assert (second.folder / "rope.json").read_text() == (first.folder / "rope.json").read_text()


def test_where_rows_fit_nothing_is_scaled_then_or_later(bench: Bench) -> None:
    done = bench.train(rope_scaling="yarn", cutoff_len=40, truncation="keep_end")
    assert "not needed, cutoff_len 40 fits into the 40 positions" in done.said
    assert "rope.json" not in done.files
    run = Run.from_dict(bench.keys(output_dir=str(done.folder), rope_scaling="yarn"))
    assert find_trained(run.model, run.adapter, run.loop.output_dir).change is None


def test_long_rows_train_packed_and_padded_alike(bench: Bench) -> None:
    """Rows of 50 to 69 tokens in a model of 40 positions, dynamic: the step does not depend on how rows lie."""
    base = {"rope_scaling": "dynamic", "max_steps": 3}
    packed, padded = bench.train(**base), bench.train(**base, packed_attention=False, token_budget=80)
    assert packed.column("loss") == pytest.approx(padded.column("loss"), rel=1e-4)


def test_training_a_model_without_rotary_positions_is_told(tmp_path: Path, bench: Bench) -> None:
    from transformers import GPT2LMHeadModel

    folder = build_model(tmp_path / "gpt2")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=600)).save_pretrained(str(folder))
    complaint = bench.train(model_name_or_path=str(folder), rope_scaling="linear").complaint
    assert "has no rotary positions" in complaint and "'gpt2'" in complaint
