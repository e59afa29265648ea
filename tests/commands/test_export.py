"""A merged model in a folder: every other program can load it and talks with it as it was trained."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import build_model, build_tokenizer
from finery.commands.export import export
from finery.commands.train import train
from finery.data.sample import Message
from finery.data.template import TemplateOptions, load_template
from finery.errors import UserError
from finery.models.adapters.lora import LoRA
from finery.models.ending import save_stop_tokens
from finery.models.load import load_model
from finery.models.ollama import ollama_file
from finery.models.tokenizer import load_tokenizer
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
IDS = torch.tensor([[5, 9, 40, 77, 3, 120]])
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def plain(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer as anybody would load them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(str(folder)), AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(params=["tied fp32", "untied fp32", "tied bf16", "untied bf16"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tied, dtype = request.param.split()
    folder = build_model(tmp_path / "base", tie_word_embeddings=tied == "tied")
    load_model(folder, torch.bfloat16 if dtype == "bf16" else torch.float32, False).save_pretrained(str(folder))
    return folder


def test_merged_is_the_base_with_its_adapter(base: Path, keys: Keys) -> None:
    from peft import PeftModel

    run = Run.from_dict(keys(model_name_or_path=str(base), learning_rate=0.02))
    adapter, merged = train(run), export(run)
    dtype = load_file(base / "model.safetensors")["model.norm.weight"].dtype
    weights = load_file(merged / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert weights.keys() == load_file(base / "model.safetensors").keys()  # tied weights are not written twice
    ours = LoRA(LoRA.Options.model_validate({})).merge(load_model(base, torch.float32, False), [adapter]).state_dict()
    assert all(torch.equal(weight, ours[name].to(dtype)) for name, weight in weights.items())  # rounded once, at the end
    if dtype == torch.float32:
        unmerged = PeftModel.from_pretrained(load_model(base, torch.float32, False), str(adapter))
        assert torch.allclose(logits(plain(merged)[0]), logits(unmerged), atol=1e-5)
        assert not torch.allclose(logits(plain(merged)[0]), logits(load_model(base, torch.float32, False)), atol=1e-2)


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_whole_models_are_exported_from_the_output_folder(kind: str, keys: Keys, tiny_model: Path) -> None:
    run = Run.from_dict(keys(finetuning_type=kind, learning_rate=0.02))
    trained, exported = train(run), export(run)
    assert torch.equal(logits(plain(exported)[0]), logits(plain(trained)[0]))
    assert not torch.allclose(logits(plain(exported)[0]), logits(load_model(tiny_model, torch.float32, False)), atol=1e-2)


def test_the_base_itself_is_exported_where_nothing_was_trained(keys: Keys, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(Run.from_dict(keys()))
    assert f"exporting {tiny_model} itself" in capsys.readouterr().err
    assert torch.equal(logits(plain(folder)[0]), logits(plain(tiny_model)[0]))


# ------------------------------------------------------------------ what goes with the weights


@pytest.mark.parametrize(("template", "stops"), [(None, {"<|im_end|>"}), ("llama3", {"<|eot_id|>", "<|eom_id|>"})])
def test_answers_end_where_they_should(template: str | None, stops: set[str], keys: Keys) -> None:
    folder = export(Run.from_dict(keys(template=template)))
    model, tokenizer = plain(folder)
    assert set(tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)) == stops


def test_plain_transformers_ends_at_every_stop(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model, torch.float32, False)
    first = int(logits(model)[0, -1].argmax())
    how = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "pad_token_id": 0, "max_new_tokens": 4}
    for name, stops, length in (("one", {2}, 10), ("two", {2, first}, 7)):
        model.save_pretrained(str(tmp_path / name))
        save_stop_tokens(model, tmp_path / name, frozenset(stops))
        assert load_model(tmp_path / name, torch.float32, False).generate(IDS, **how).shape[1] == length


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {}),
    ],
)
def test_sampling_settings_of_the_base_are_kept(config: dict[str, Any], kept: dict[str, Any], tmp_path: Path, keys: Keys) -> None:
    base = build_model(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    written = json.loads((export(Run.from_dict(keys(model_name_or_path=str(base)))) / "generation_config.json").read_text())
    assert {key: written[key] for key in ("temperature", "top_p", "do_sample") if written.get(key)} == kept


@pytest.mark.parametrize("template", [None, "llama3", "alpaca"])
def test_the_tokenizer_brings_the_template_it_was_trained_with(template: str | None, keys: Keys, tiny_model: Path) -> None:
    run = Run.from_dict(keys(template=template))
    train(run)
    folder = export(run)
    ours = load_template(run.template, load_tokenizer(tiny_model, False))
    tokenizer = plain(folder)[1]
    assert tokenizer.chat_template == ours.jinja
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.prompt_ids([Message("user", "Hi")])
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_config_is_ready_for_serving(keys: Keys) -> None:
    config = json.loads((export(Run.from_dict(keys())) / "config.json").read_text())
    assert config["use_cache"] is True and config["architectures"] == ["LlamaForCausalLM"]


# ------------------------------------------------------------------ where it goes


def test_default_folder(keys: Keys, tmp_path: Path) -> None:
    assert export(Run.from_dict(keys(output_dir=f"{tmp_path}/run/"))) == tmp_path / "run-merged"
    assert export(Run.from_dict(keys(export_dir=str(tmp_path / "here")))) == tmp_path / "here"


def test_no_folder_at_all(keys: Keys) -> None:
    with pytest.raises(UserError, match="'export_dir' is needed and was not given"):
        export(Run.from_dict(keys(output_dir=None, do_train=None)))


def test_other_files_are_not_overwritten(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis holds files that no export has written"):
        export(Run.from_dict(keys(export_dir=str(tmp_path / "thesis"))))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


@pytest.mark.parametrize("key", ["model_name_or_path", "output_dir"])
def test_what_is_exported_is_not_overwritten(key: str, keys: Keys, tmp_path: Path) -> None:
    base = build_model(tmp_path / "base")
    run = keys(model_name_or_path=str(base), finetuning_type="full")
    train(Run.from_dict(run))
    before = {path.name: path.read_bytes() for path in Path(run[key]).iterdir() if path.is_file()}
    with pytest.raises(UserError, match="holds files that no export has written"):
        export(Run.from_dict(run | {"export_dir": run[key]}))
    assert before == {path.name: path.read_bytes() for path in Path(run[key]).iterdir() if path.is_file()}


def test_an_export_is_not_exported_onto_itself(keys: Keys, tmp_path: Path) -> None:
    folder = str(export(Run.from_dict(keys())))
    with pytest.raises(UserError, match="is or holds what is to be exported"):
        export(Run.from_dict(keys(model_name_or_path=folder, export_dir=folder)))
    assert (Path(folder) / "model.safetensors").exists()


def test_a_file_is_no_folder(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match="'export_dir'"):
        export(Run.from_dict(keys(export_dir=str(tmp_path / "notes.txt"))))


def test_an_older_export_is_replaced(keys: Keys, tmp_path: Path) -> None:
    folder = export(Run.from_dict(keys()))
    (folder / "Modelfile").write_text("old")
    assert export(Run.from_dict(keys())) == folder and (folder / "Modelfile").read_text() != "old"
    (folder / "left-over.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that no export has written"):
        export(Run.from_dict(keys()))
    (folder / "left-over.txt").unlink()
    (folder / "parity.json").unlink()  # as exports were before there were reports
    assert export(Run.from_dict(keys())) == folder and (folder / "parity.json").exists()
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_pickled(keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("lora", "full"):
        run = Run.from_dict(
            keys(
                finetuning_type=kind,
                save_strategy="steps",
                save_steps=1,
                plot_loss=True,
                output_dir=str(tmp_path / kind),
                export_legacy_format=True,
            )
        )
        train(run)
        assert (tmp_path / kind / "checkpoint-1").is_dir()
        export(run)
    assert "'export_legacy_format' asks for pickled .bin files, which are never written" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.suffix in PICKLED] == []


# ------------------------------------------------------------------ Ollama


def go_render(template: str, values: dict[str, Any]) -> str:
    """The few words of Go's template language that a Modelfile of ours has."""
    parts = iter(re.split(r"\{\{\s*(.*?)\s*\}\}", template))
    return _block([*parts], [0], values)[0]


def _block(parts: list[str], at: list[int], values: dict[str, Any]) -> tuple[str, str]:
    """Text up to the `end` or `else` that closes the block, and that word."""
    text = ""
    while True:
        text += parts[at[0]]
        if at[0] + 1 == len(parts):
            return text, ""
        word = parts[at[0] + 1]
        at[0] += 2
        if word == "end" or word.startswith("else"):
            return text, word
        if word == "range .Messages":
            start = at[0]
            for message in values["Messages"] or [{}]:
                at[0] = start
                inner = _block(parts, at, message)[0]
                text += inner if message else ""
        elif word.startswith("if "):
            text += _choice(word, parts, at, values)
        else:
            text += str(values.get(word.removeprefix("."), ""))


def _choice(word: str, parts: list[str], at: list[int], values: dict[str, Any]) -> str:
    chosen, closing = None, word
    while closing != "end":
        condition = closing.removeprefix("else ").removeprefix("if ")
        text, closing = _block(parts, at, values)
        if chosen is None and _holds(condition, values):
            chosen = text
    return chosen or ""


def _holds(condition: str, values: dict[str, Any]) -> bool:
    if equal := re.fullmatch(r'eq \.(\w+) "(\w+)"', condition):
        return values.get(equal[1]) == equal[2]
    return bool(values.get(condition.removeprefix(".")))


def conversations() -> Iterator[list[dict[str, str]]]:
    """With and without a system message, of one to three rounds, ending with a question."""
    for system in ("", "Be brief.\nAnd kind."):
        for rounds in (0, 1, 2):
            talk = [{"role": "system", "content": system}] if system else []
            for number in range(rounds):
                talk += [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": f"Answer\n{number}."}]
            yield [*talk, {"role": "user", "content": "And {{ this }}?"}]


def modelfile(name: str | None, folder: Path, jinja: str | None = None) -> tuple[str, Any]:
    build_tokenizer(folder, **({"chat_template": jinja} if jinja else {}))
    tokenizer = load_tokenizer(folder, False)
    template = load_template(TemplateOptions(template=name), tokenizer)
    return ollama_file(tokenizer, template.stop_ids, 4096), tokenizer


@pytest.mark.parametrize("name", [None, "chatml", "llama3", "qwen", "alpaca", "default"])
def test_ollama_renders_the_same_text(name: str | None, tmp_path: Path) -> None:
    text, tokenizer = modelfile(name, tmp_path)
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    default = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    assert template is not None
    for talk in conversations():
        messages = [{"Role": message["role"], "Content": message["content"]} for message in talk]
        system = talk[0]["content"] if talk[0]["role"] == "system" else default[1] if default else ""
        ours = go_render(template[1], {"System": system, "Messages": messages})
        assert ours == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        (None, ["<|im_end|>"]),
        ("chatml", ["<|im_end|>", "<|im_start|>"]),
        ("llama3", ["<|eot_id|>", "<|eom_id|>"]),
        ("alpaca", ["<|im_end|>"]),
    ],
)
def test_ollama_stops(name: str | None, stops: list[str], tmp_path: Path) -> None:
    text, _ = modelfile(name, tmp_path)
    lines = text.splitlines()
    assert sorted(line for line in lines if "stop" in line) == sorted(f'PARAMETER stop "{stop}"' for stop in stops)
    assert "FROM ." in lines and "PARAMETER num_ctx 4096" in lines


def test_ollama_gets_the_default_system_prompt(tmp_path: Path) -> None:
    text, _ = modelfile("alpaca", tmp_path)
    assert 'SYSTEM """Below is an instruction that describes a task.' in text


STRANGE = {
    "no system prompt": "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}[assistant]",
    "rewrites history": "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content | upper }}{% endfor %}[assistant]",
    "counts": "{% for m in messages %}[{{ loop.index }} {{ m.role }}]{{ m.content }}{% endfor %}[assistant]",
    "refuses": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("jinja", STRANGE.values(), ids=STRANGE)
def test_a_template_that_ollama_cannot_tell(jinja: str, tmp_path: Path) -> None:
    text, _ = modelfile(None, tmp_path, jinja)
    assert "TEMPLATE" not in text and "# the chat template of this model cannot be told in Ollama's language" in text
