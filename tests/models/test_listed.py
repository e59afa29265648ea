"""Models that are known by name: nothing of the list is lost, names become hub ids, and templates are told by name, id or folder."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import finery.models.load as load_module
from finery.cli import main
from finery.errors import UserError
from finery.hub import Hub
from finery.models.listed import did_you_mean, find_model, hub_id, listed_models, template_of
from finery.models.load import ModelOptions, locate_model
from finery.run import Run

MENDED: dict[str, dict[Hub, str]] = {
    "Falcon-H1-1.5B-Deep-Base": {"hf": "tiuae/Falcon-H1-1.5B-Deep-Base"},
    "Gemma-7B": {"ms": "AI-ModelScope/gemma-2b-it"},
    "Gemma-2B-Instruct": {"ms": "AI-ModelScope/gemma-7b"},
    "TeleChat2.5-35B-Chat": {"ms": "TeleAI/TeleChat2-35B-Nov"},
    "Qwen2.5-Math-1.5B-Instruct": {"ms": "Qwen/Qwen2.5-Coder-1.5B-Instruct"},
    "Qwen2.5-Math-7B-Instruct": {"ms": "Qwen/Qwen2.5-Coder-7B-Instruct"},
    "Qwen2.5-Math-72B-Instruct": {"ms": "Qwen/Qwen2.5-Coder-72B-Instruct"},
}
"""Ids of LLaMA-Factory's list that are of another model, or of none."""
TUNED_IN_SMALL_LETTERS = {"Phi-3.5-4B-instruct", "Phi-3.5-MoE-42B-A6.6B-instruct", "Phi-4-3.8B-instruct"}
"""LLaMA-Factory takes them for base models, since their names say -instruct and not -Instruct."""


@pytest.fixture(autouse=True)
def hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB"):
        monkeypatch.delenv(name, raising=False)
    load_module._listed_id.cache_clear()


# ------------------------------------------------------------------ the list


def test_nothing_of_the_reference_is_lost(shared: Path) -> None:
    facts = json.loads((shared / "reference" / "models.json").read_text(encoding="utf-8"))
    reference = {
        model["name"]: model for model in facts["models"]
    }  # of a name that stands there twice the later one counts, as it does there
    assert reference.keys() == listed_models().keys()
    for name, there in reference.items():
        model = listed_models()[name]
        assert {**model.ids, **MENDED.get(name, {})} == {hub: there[hub] for hub in ("hf", "ms", "om") if there[hub]}, name
        assert (model.family_template, model.multimodal) == (there["group_template"], there["multimodal"]), name
        if name in TUNED_IN_SMALL_LETTERS:
            assert (model.template, there["auto_template"]) == (there["group_template"], None), name
        else:
            assert model.template == there["auto_template"], name


def test_every_model_is_on_hugging_face_and_ids_are_ids() -> None:
    for name, model in listed_models().items():
        assert "hf" in model.ids and model.ids.keys() <= {"hf", "ms", "om"}, name
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) for hub_id in model.ids.values()), name


def test_names_differ_by_more_than_capitals() -> None:
    assert len({name.lower() for name in listed_models()}) == len(listed_models()) > 600


# ------------------------------------------------------------------ names


def test_a_name_is_found_in_capitals_or_not() -> None:
    found = find_model("qwen3-8b-THINKING")
    assert found is not None and (found.name, found.ids["hf"], found.template, found.multimodal) == (
        "Qwen3-8B-Thinking",
        "Qwen/Qwen3-8B",
        "qwen3",
        False,
    )
    assert find_model("Qwen3-8B-Instruct") is found, "an older name of it"
    assert find_model("Qwen/Qwen3-8B") is None, "an id is no name"


@pytest.mark.parametrize(
    ("name", "hub", "wanted"),
    [
        ("Llama-3-8B-Instruct", "hf", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("Llama-3-8B-Instruct", "ms", "LLM-Research/Meta-Llama-3-8B-Instruct"),
        ("Qwen2-7B-Instruct", "ms", "Qwen/Qwen2-7B-Instruct"),
        ("Qwen2-7B-Instruct", "om", "LlamaFactory/Qwen2-7B-Instruct"),
        ("gpt2", "hf", "gpt2"),
        ("meta-llama/Meta-Llama-3-8B", "ms", "meta-llama/Meta-Llama-3-8B"),
    ],
)
def test_a_name_becomes_what_the_hub_calls_it(name: str, hub: Hub, wanted: str) -> None:
    assert hub_id(name, hub) == wanted


def test_a_hub_that_has_not_the_model() -> None:
    with pytest.raises(UserError) as caught:
        hub_id("Aya-23-8B-Chat", "ms")
    assert str(caught.value) == (
        "ModelScope is not known to have 'Aya-23-8B-Chat', which is 'CohereForAI/aya-23-8B' on Hugging Face; "
        "unset USE_MODELSCOPE_HUB to use Hugging Face, or give a folder or an id"
    )


@pytest.mark.parametrize(
    ("name", "hub", "said"),
    [
        ("Qwen3-8B-Instrct", "hf", "; did you mean 'Qwen3-8B-Instruct'?"),
        ("Qwen3-8B", "hf", "; did you mean 'Qwen/Qwen3-8B'?"),
        ("Qwen/Qwen3-8b-Bse", "hf", "; did you mean 'Qwen/Qwen3-8B-Base'?"),
        ("meta-llama/Meta-Llama-3-8B", "ms", "; did you mean 'LLM-Research/Meta-Llama-3-8B'?"),
        ("meta-llama/Meta-Llama-3-8B", "hf", ""),
        ("CohereForAI/aya-23-8B", "ms", ""),
        ("somebody/tiny", "hf", ""),
    ],
)
def test_did_you_mean(name: str, hub: Hub, said: str) -> None:
    assert did_you_mean(name, hub) == said


# ------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    ("name_or_path", "template"),
    [
        ("Llama-3-8B-Instruct", "llama3"),
        ("Llama-3-8B", None),
        ("Qwen3-8B-Instruct", "qwen3"),
        ("meta-llama/meta-llama-3-8b-instruct", "llama3"),
        ("LLM-Research/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Meta-Llama-3-8B", None),
        ("Meta-Llama-3-8B-Instruct", "llama3"),
        ("/models/Meta-Llama-3-8B-Instruct/", "llama3"),
        ("./Llama-3-8B-Instruct", "llama3"),
        ("/models/Llama-3-8B-Instruct/checkpoint-5", None),
        ("~/cache/hub/models--meta-llama--Meta-Llama-3-8B-Instruct/snapshots/0123abcd", "llama3"),
        ("/cache/models/qwen--Qwen2.5-7B-Instruct/snapshots/master", "qwen"),
        ("/cache/hub/qwen/Qwen2___5-7B-Instruct", "qwen"),
        ("Qwen/Qwen2-VL-7B", "qwen2_vl"),
        ("bigscience/bloomz-560m", None),
        ("somebody/tiny", None),
        ("/", None),
        ("", None),
    ],
)
def test_the_template_of_a_model(name_or_path: str, template: str | None) -> None:
    assert template_of(name_or_path) == template


def test_every_name_and_id_tells_its_template() -> None:
    for name, model in listed_models().items():
        for word in (name, *model.ids.values()):
            assert template_of(word) == model.template, (name, word)


# ------------------------------------------------------------------ runs


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are asked for."""
    asked: list[str] = []

    def fetch(name: str, **how: Any) -> Path:
        asked.append(name)
        return Path("somewhere")

    monkeypatch.setattr(load_module, "fetch", fetch)
    return asked


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("finery.models.load"), "info", lambda text, *facts: lines.append(text % facts))
    return lines


def test_a_run_takes_a_listed_model_from_the_hub(fetched: list[str], told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ModelOptions(model_name_or_path="llama-3-8B-Instruct")
    locate_model(options)
    locate_model(options)
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    locate_model(options)
    locate_model(ModelOptions(model_name_or_path="somebody/tiny"))
    assert fetched == [*["meta-llama/Meta-Llama-3-8B-Instruct"] * 2, "LLM-Research/Meta-Llama-3-8B-Instruct", "somebody/tiny"]
    assert told == [
        "llama-3-8B-Instruct is meta-llama/Meta-Llama-3-8B-Instruct on Hugging Face",
        "llama-3-8B-Instruct is LLM-Research/Meta-Llama-3-8B-Instruct on ModelScope",
    ]


def test_a_folder_of_that_name_comes_first(fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Llama-3-8B-Instruct").mkdir()
    locate_model(ModelOptions(model_name_or_path="Llama-3-8B-Instruct"))
    assert fetched == ["Llama-3-8B-Instruct"]


def test_a_name_that_no_hub_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        locate_model(ModelOptions(model_name_or_path="Llama-3-8B-Instrct", cache_dir=str(tmp_path)))
    assert "'Llama-3-8B-Instrct'" in str(caught.value) and str(caught.value).endswith("; did you mean 'Llama-3-8B-Instruct'?")


def test_a_path_gets_no_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        locate_model(ModelOptions(model_name_or_path=str(tmp_path / "Llama-3-8B-Instrct")))
    assert "did you mean" not in str(caught.value)


def test_a_hub_without_the_model_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    with pytest.raises(UserError, match="'model_name_or_path' cannot be used: ModelScope is not known to have 'Aya-23-8B-Chat'"):
        Run.from_dict({"model_name_or_path": "Aya-23-8B-Chat"})


def test_the_list_is_not_read_for_help_or_for_a_folder(tiny_model: Path) -> None:
    code = (
        "import sys; from finery.cli import main; main(['--help']); assert 'finery.models.listed' not in sys.modules; "
        "from finery.models.load import ModelOptions, locate_model; from finery.run import Run; "
        f"locate_model(Run.from_dict({{'model_name_or_path': {str(tiny_model)!r}}}).model); "
        "from finery.models.listed import listed_models; print(listed_models.cache_info().currsize)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0"


# ------------------------------------------------------------------ the table


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["options", "models", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_table_of_all_models(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys)
    names = [line.split()[0] for line in lines if line.split()]
    assert set(listed_models()) <= set(names)


def test_words_choose_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [line.split() for line in lines_of(capsys, "qwen3-8b")]
    assert rows[0] == ["name", "id", "on", "Hugging", "Face", "template"]
    assert ["Qwen3-8B-Thinking", "Qwen/Qwen3-8B", "qwen3"] in rows
    assert ["Qwen3-8B-Base", "Qwen/Qwen3-8B-Base", "default", "(or", "qwen3)"] in rows
    assert [row[0] for row in map(str.split, lines_of(capsys, "VL-8b", "thinking", "multimodal"))][1:] == ["Qwen3-VL-8B-Thinking"]
    assert [line.split()[0] for line in lines_of(capsys, "qwen3-8b-instruct")] == ["name", "Qwen3-8B-Thinking"], "an older name of it"
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    rows = [line.split() for line in lines_of(capsys, "aya-23-8b")]
    assert rows[1] == ["Aya-23-8B-Chat", "-", "cohere"]


def test_words_that_no_model_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "models", "qwen3-8b-thinkng"]) == 2
    assert capsys.readouterr().err == "error: no listed model holds 'qwen3-8b-thinkng'; did you mean 'Qwen3-8B-Thinking'?\n"
