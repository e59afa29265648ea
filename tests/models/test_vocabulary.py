"""Tokens that a model has no row for: embeddings grow, only the new rows are trained, and they come back with the adapter."""

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
from finery.data.sample import Message
from finery.models.adapters.lora import LoRA
from finery.models.load import fit_vocabulary, load_model
from finery.models.tokenizer import load_tokenizer
from finery.models.trained import find_trained, load_trained
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
GROWN = 384  # from 364 rows of the tiny model and 2 new tokens, to a multiple of 64
STOPS = {"<|eot_id|>", "<|eom_id|>"}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "base", tie_word_embeddings=request.param)


@pytest.fixture
def run(base: Path, keys: Keys) -> Run:
    """A run with a template whose stop words the tokenizer does not have."""
    return Run.from_dict(keys(model_name_or_path=str(base), template="llama3", learning_rate=0.02, max_new_tokens=3))


def is_tied(base: Path) -> bool:
    return load_model(base, torch.float32, False).config.tie_word_embeddings


def tuned_model(run: Run) -> tuple[Any, Any]:
    found = find_trained(run.model, run.adapter, run.loop.output_dir)
    tokenizer = load_tokenizer(found.tokenizer_folder, False)
    return load_trained(found, run.adapter, tokenizer, False, torch.float32, torch.device("cpu")), tokenizer


def test_growing_is_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    train(run)
    told = "the tokenizer has 2 tokens that the model has no row for: the embeddings grow ('resize_vocab: true')"
    assert told in capsys.readouterr().err


def test_resize_vocab_says_nothing(base: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    train(Run.from_dict(keys(model_name_or_path=str(base), template="llama3", resize_vocab=True)))
    assert "embeddings grow" not in capsys.readouterr().err


@pytest.mark.parametrize("resize", [True, False])
def test_rows_grow_to_a_multiple_of_64(resize: bool, base: Path) -> None:
    model, tokenizer = load_model(base, torch.float32, False), load_tokenizer(base, False)
    old = model.get_input_embeddings().weight.detach().clone()
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(STOPS)})
    assert fit_vocabulary(model, tokenizer, resize) == range(364, 366)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape == (GROWN, 32)
    assert model.config.vocab_size == GROWN
    assert torch.equal(model.get_input_embeddings().weight[:364], old)
    assert not torch.equal(*model.get_input_embeddings().weight[364:366])  # two new rows can part


def test_nothing_grows_where_every_token_has_a_row(tiny_model: Path) -> None:
    model = load_model(tiny_model, torch.float32, False)
    assert not fit_vocabulary(model, load_tokenizer(tiny_model, False), resize=True)
    assert model.get_input_embeddings().weight.shape[0] == 364


def test_only_new_rows_and_the_adapter_are_trained(base: Path) -> None:
    model, tokenizer = load_model(base, torch.float32, False), load_tokenizer(base, False)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(STOPS)})
    tuned = LoRA(LoRA.Options.model_validate({})).apply(model, (), fit_vocabulary(model, tokenizer, resize=True))
    trained = {name: tuple(weight.shape) for name, weight in tuned.named_parameters() if weight.requires_grad}
    rows = {name: shape for name, shape in trained.items() if "lora_" not in name}
    assert set(rows.values()) == {(2, 32)}
    assert len(rows) == (1 if is_tied(base) else 2)  # a head of its own has rows of its own


def test_training_changes_the_new_rows_and_no_old_one(run: Run, base: Path) -> None:
    train(run)
    model, tokenizer = tuned_model(run)
    start = load_model(base, torch.float32, False)
    fit_vocabulary(start, tokenizer, resize=True)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for read in (lambda model: model.get_input_embeddings().weight, lambda model: model.get_output_embeddings().weight):
        before, after = read(start), read(model)
        assert torch.equal(before[:364], after[:364]) and torch.equal(before[366:], after[366:])
        assert not torch.allclose(before[eot], after[eot], atol=1e-3)


def test_the_adapter_holds_the_new_rows_alone(run: Run, base: Path) -> None:
    saved = load_file(train(run) / "adapter_model.safetensors")
    beside = {name: tuple(weight.shape) for name, weight in saved.items() if "lora_" not in name}
    assert set(beside.values()) == {(2, 32)}
    assert len(beside) == (1 if is_tied(base) else 2)


def test_chat_loads_what_was_trained(run: Run) -> None:
    train(run)
    engine, template = open_engine(run)
    assert {engine.tokenizer.decode([id]) for id in template.stop_ids} == STOPS  # type: ignore[attr-defined]
    assert isinstance(engine.generate(template.prompt_ids([Message("user", "Hi")]), run.generation), str)


def test_exported_model_and_tokenizer_load_plainly(run: Run, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(run)
    ours, _ = tuned_model(run)
    folder = export(run)
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    assert model.config.vocab_size == GROWN
    assert set(tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)) == STOPS
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == is_tied(base)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != is_tied(base)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, ours.eval()(ids).logits, atol=1e-5)


def test_going_on_with_new_rows(run: Run, base: Path, keys: Keys) -> None:
    first = train(run)
    changes = {"model_name_or_path": str(base), "template": "llama3", "adapter_name_or_path": str(first), "learning_rate": 0.02}
    second = train(Run.from_dict(keys(output_dir=str(first.with_name("second")), **changes)))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_full_training_saves_the_grown_model(base: Path, keys: Keys) -> None:
    from transformers import AutoModelForCausalLM

    run = Run.from_dict(keys(model_name_or_path=str(base), template="llama3", finetuning_type="full"))
    model: Any = AutoModelForCausalLM.from_pretrained(str(train(run)))
    assert model.get_input_embeddings().weight.shape[0] == GROWN
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == is_tied(base)


@pytest.mark.parametrize("key", ["bf16", "pure_bf16"])
def test_new_rows_in_half_precision(key: str, base: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finery.models.precision.cpu_computes_bf16", lambda: True)
    folder = train(Run.from_dict(keys(model_name_or_path=str(base), template="llama3", learning_rate=0.02, **{key: True})))
    rows = [weight for name, weight in load_file(folder / "adapter_model.safetensors").items() if "lora_" not in name]
    assert {weight.dtype for weight in rows} == {torch.float32 if key == "bf16" else torch.bfloat16}


@pytest.mark.parametrize("names", ["embed_tokens", "lm_head", "model.embed_tokens, lm_head"])
def test_embeddings_trained_whole(names: str, base: Path, keys: Keys) -> None:
    changes = {"template": "llama3", "learning_rate": 0.02, "additional_target": names}
    run = Run.from_dict(keys(model_name_or_path=str(base), **changes))
    saved = load_file(train(run) / "adapter_model.safetensors")
    whole = {name.split(".")[-2] for name, weight in saved.items() if weight.shape == (GROWN, 32)}
    assert whole == ({"embed_tokens", "lm_head"} if is_tied(base) else {name.rpartition(".")[2] for name in names.split(", ")})
    merged, _ = tuned_model(run)
    for name, layer in (("embed_tokens", merged.get_input_embeddings()), ("lm_head", merged.get_output_embeddings())):
        if name in whole:
            assert torch.equal(next(weight for key, weight in saved.items() if key.endswith(f"{name}.weight")), layer.weight)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == is_tied(base)
