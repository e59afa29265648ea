"""Tokens that a run adds: one id each, rows that start as asked, are trained, saved, and there again in chat and export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import build_model
from finery.commands.chat import open_engine
from finery.commands.export import export
from finery.commands.train import train
from finery.errors import UserError
from finery.models.load import fit_vocabulary, load_model
from finery.models.new_tokens import TokenOptions, descriptions, give_tokens
from finery.models.tokenizer import load_tokenizer
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
THINK = "<|think|>"
ASKED = {"add_tokens": "plus", "add_special_tokens": THINK}
ROWS = 364  # of the tiny model


@pytest.fixture
def described(tmp_path: Path) -> str:
    path = tmp_path / "tokens.yaml"
    path.write_text(f'"{THINK}": Who are you?\n"<|end|>": the lazy dog\n')
    return str(path)


def grown(base: Path, options: TokenOptions) -> tuple[Any, Any, range]:
    model, tokenizer = load_model(base, torch.float32, False), load_tokenizer(base, False)
    known = len(tokenizer)
    give_tokens(tokenizer, options)
    return model, tokenizer, fit_vocabulary(model, tokenizer, False, known, options)


def test_ids_do_not_shift(tiny_model: Path) -> None:
    before = load_tokenizer(tiny_model, False).get_vocab()
    model, tokenizer, new = grown(tiny_model, TokenOptions.model_validate({**ASKED, "add_tokens": "plus, <|im_end|>"}))
    assert new == range(ROWS, ROWS + 2)  # what is known already is not added again
    assert {token: id for token, id in tokenizer.get_vocab().items() if id < ROWS} == before
    assert (len(tokenizer("plus")["input_ids"]), tokenizer(THINK)["input_ids"]) == (1, [ROWS + 1])
    assert model.get_input_embeddings().weight.shape[0] == 384
    assert tokenizer.decode([5, ROWS + 1], skip_special_tokens=True) == tokenizer.decode([5])


@pytest.mark.parametrize("tied", [True, False])
def test_rows_start_at_their_description(tied: bool, described: str, tmp_path: Path) -> None:
    base = build_model(tmp_path / "base", tie_word_embeddings=tied)
    old = load_model(base, torch.float32, False)
    words = load_tokenizer(base, False)("Who are you?", add_special_tokens=False)["input_ids"]
    rows = {}
    for how in ("noise_init", "desc_init", "desc_init_w_noise"):
        model, tokenizer, new = grown(base, TokenOptions(new_special_tokens_config=described, init_special_tokens=how))  # type: ignore[arg-type]
        assert len(new) == 2
        for layer, before in (
            (model.get_input_embeddings(), old.get_input_embeddings()),
            (model.get_output_embeddings(), old.get_output_embeddings()),
        ):
            row = layer.weight.detach()[tokenizer.convert_tokens_to_ids(THINK)]
            apart = row - (before.weight[:ROWS] if how == "noise_init" else before.weight[words]).detach().mean(0)
            assert float(apart.std()) == pytest.approx(0 if how == "desc_init" else 32**-0.5, rel=0.4, abs=1e-6)
        rows[how] = row
    assert not torch.equal(rows["noise_init"], rows["desc_init_w_noise"])


def test_trained_saved_and_alive_after_reload(keys: Keys, tiny_model: Path) -> None:
    names = keys(**ASKED, learning_rate=0.02, max_new_tokens=3)
    folder = train(Run.from_dict(names))
    (trained,) = (weight for name, weight in load_file(folder / "adapter_model.safetensors").items() if "token" in name)
    started = grown(tiny_model, TokenOptions.model_validate(ASKED))[0].get_input_embeddings().weight.detach()[ROWS : ROWS + 2]
    assert not torch.equal(trained[0], started[0])  # "plus" is in every sample
    engine, _ = open_engine(Run.from_dict(names))
    assert torch.allclose(engine.model.get_input_embeddings().weight[ROWS : ROWS + 2], trained)  # type: ignore[attr-defined]
    target = export(Run.from_dict(names))
    merged, tokenizer = load_model(target, torch.float32, False), load_tokenizer(target, False)
    assert torch.allclose(merged.get_input_embeddings().weight[ROWS : ROWS + 2], trained)
    assert [tokenizer(word)["input_ids"] for word in ("plus", THINK)] == [[ROWS], [ROWS + 1]]


def test_rows_that_a_model_has_to_spare_are_trained_too(keys: Keys, tmp_path: Path) -> None:
    base = build_model(tmp_path / "roomy", vocab_size=400)
    folder = train(Run.from_dict(keys(model_name_or_path=str(base), **ASKED)))
    (trained,) = (weight for name, weight in load_file(folder / "adapter_model.safetensors").items() if "token" in name)
    assert trained.shape == (2, 32)


def test_rows_that_nothing_trains_are_told(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    train(Run.from_dict(keys(**ASKED, finetuning_type="freeze", freeze_trainable_layers=1)))
    assert "the rows of 2 new tokens are not trained" in capsys.readouterr().err


def test_full_tuning_keeps_the_tokens(keys: Keys) -> None:
    folder = train(Run.from_dict(keys(**ASKED, finetuning_type="full")))
    assert load_tokenizer(folder, False)(THINK)["input_ids"] == [ROWS + 1]
    assert load_model(folder, torch.float32, False).get_input_embeddings().weight.shape[0] == 384


@pytest.mark.parametrize(("text", "told"), [("- a\n", "does not"), ("a: 3\n", "does not"), ("a: [\n", "cannot be read")])
def test_a_file_that_is_no_mapping(text: str, told: str, keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Run.from_dict(keys(new_special_tokens_config=str(path)), trains=True)
    assert "'new_special_tokens_config' should " in str(caught.value)
    assert f"{path} {told}" in str(caught.value)


def test_one_place_names_special_tokens(keys: Keys, described: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.from_dict(keys(new_special_tokens_config=described, add_special_tokens="<|other|>"), trains=True)
    assert list(descriptions(run.tokens)) == [THINK, "<|end|>"]
    assert "'new_special_tokens_config' counts, and not 'add_special_tokens'" in capsys.readouterr().err
    Run.from_dict(keys(init_special_tokens="desc_init"), trains=True)
    assert "'init_special_tokens' begins with descriptions" in capsys.readouterr().err
