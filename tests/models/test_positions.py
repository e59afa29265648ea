"""Rows longer than the positions that a model has learnt are cut there; models that compute positions take them as they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import finery
from conftest import build_tokenizer
from finery.models.positions import learnt_positions

POSITIONS = 40
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": POSITIONS,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
    },
}


@pytest.fixture(params=list(SHAPES))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    folder = tmp_path / request.param
    folder.mkdir()
    build_tokenizer(folder)
    config = AutoConfig.for_model(request.param, vocab_size=len(AutoTokenizer.from_pretrained(str(folder))), **SHAPES[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return request.param, folder


@pytest.mark.parametrize("packing", [False, True])
def test_rows_end_where_learnt_positions_end(
    model: tuple[str, Path], packing: bool, keys: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    name, folder = model
    learnt = name in ("gpt2", "opt")
    assert learnt_positions(folder) == (POSITIONS if learnt else None)
    given = keys(model_name_or_path=str(folder), lora_target="all", max_steps=1, packing=packing)
    folder = finery.train(given)
    said = "cutoff_len: 40 # decided: the positions that the model has learnt"
    assert (said in " ".join((folder / "run.yaml").read_text().split())) is learnt
    assert ("this model has learnt 40 positions: rows are cut there" in caplog.text) is learnt
    longest = max(len(row.ids) for shown in finery_rows(given) for row in shown)
    assert longest == POSITIONS if learnt else longest > POSITIONS


def finery_rows(given: dict[str, Any]) -> list[list[Any]]:
    """What `finery show` has of each sample."""
    from finery.previews.rows import Preview
    from finery.run import Run

    return [list(shown.rows) for shown in Preview(Run.from_dict(given)).samples()]
