"""The keys of templates: the model's own, a user's own file, the list of models, thoughts, default texts."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from finery.data.dialects import DIALECTS
from finery.data.jinja import JinjaTemplate
from finery.data.sample import Message, Sample
from finery.data.slots import SlotTemplate
from finery.data.template import TemplateOptions, load_template
from finery.errors import UserError
from finery.models.listed import template_of
from finery.run import Run
from named import text_of

ASKED = Sample((Message("user", "One?"), Message("assistant", "1", thought="Hm.")))


def test_auto_is_the_models_own(tokenizer: Any) -> None:
    assert isinstance(load_template(TemplateOptions(template="auto"), tokenizer), JinjaTemplate)
    assert not list(TemplateOptions(template="auto").check(None))


def test_the_list_of_models_knows_one_where_the_tokenizer_has_none(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    listed = partial(template_of, "meta-llama/Meta-Llama-3-8B-Instruct")
    assert load_template(TemplateOptions(), copy.deepcopy(tokenizer), listed).name == "llama3"
    assert load_template(TemplateOptions(template="qwen"), copy.deepcopy(tokenizer), listed).name == "qwen"
    assert load_template(TemplateOptions(), tokenizer, partial(template_of, "nobody/knows")).name == "default"


def test_a_users_own_file_beside_the_config(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine.yaml").write_text(yaml.safe_dump({"like": "chatml", "user": "Q: {{content}}\nA: ", "default_system": "Hi."}))
    (tmp_path / "runs" / "run.yaml").write_text("model_name_or_path: x\ntemplate: ./mine.yaml\ndataset: y\noutput_dir: z\n")
    monkeypatch.chdir(tmp_path)
    options = Run.read(["runs/run.yaml"]).template
    assert options.own_file == Path("runs/mine.yaml")
    template = load_template(options, tokenizer)
    assert isinstance(template, SlotTemplate)
    assert template.name == "mine.yaml"
    assert text_of(template, Sample((*ASKED.messages[:1], Message("assistant", "1")))) == (
        "<|im_start|>system\nHi.<|im_end|>\nQ: One?\nA: 1<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"usr": "{{content}}"}, "unknown key 'usr'; did you mean 'user'?"),
        ({"user": "no content"}, "'user' should hold {{content}} once, found 'no content'"),
        ({"user": ["{{content}}", "{{content}}"]}, "'user' should hold {{content}} once"),
        ({"user": 5}, "'user' should be a text or a list of texts, found 5"),
        ({"like": "chatmlx"}, "'like' should name a template that Finery has, found 'chatmlx'"),
        ({"replace_eos": "yes please"}, "'replace_eos' should be true or false, found 'yes please'"),
        ({"default_system": True}, "'default_system' should be a text, found True"),
        ({"tool_format": "qwn"}, "'tool_format' should be one of"),
        ({"thought_words": ["<a>"]}, "'thought_words' should be two texts, found ['<a>']"),
        ("text", "should hold keys such as user and assistant, found 'text'"),
        ("{broken", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_in_a_users_file_is_told(tmp_path: Path, tokenizer: Any, data: Any, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    with pytest.raises(UserError) as error:
        load_template(TemplateOptions(template=str(path)), tokenizer)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_names_that_are_not_known(tmp_path: Path) -> None:
    (finding,) = TemplateOptions(template=str(tmp_path / "no.yaml")).check(None)
    assert finding.text == f"there is no file {tmp_path / 'no.yaml'}"
    (finding,) = TemplateOptions(template="qwen", tool_format="qwn").check(None)
    assert "did you mean 'qwen'?" in finding.text
    (finding,) = TemplateOptions(tool_format="qwen").check(None)
    assert not finding.fatal


def test_a_default_system_text_and_another_dialect(tokenizer: Any) -> None:
    own = load_template(TemplateOptions(default_system="Be brief."), copy.deepcopy(tokenizer))
    assert "Be brief." in tokenizer.decode(own.prompt_ids([Message("user", "a")]))
    assert "Be brief." in text_of(own, ASKED)
    assert "Be kind." not in text_of(load_template(TemplateOptions(template="qwen", default_system=""), copy.deepcopy(tokenizer)), ASKED)
    call = Message("function", '{"name": "look", "arguments": {}}')
    mistral = load_template(TemplateOptions(template="chatml", tool_format="mistral"), copy.deepcopy(tokenizer))
    assert '[{"name": "look", "arguments": {}}]' in text_of(mistral, Sample((Message("user", "a"), call)))


def test_null_is_a_choice_of_its_own(tmp_path: Path) -> None:
    base = {"model_name_or_path": "x", "dataset": "y", "output_dir": "z", "stage": "sft", "do_train": True}
    assert Run.from_dict({**base, "enable_thinking": None}).template.enable_thinking is None
    assert Run.from_dict(base).template.enable_thinking is True
    assert Run.from_dict({**base, "enable_thinking": False}).template.enable_thinking is False


def test_thinking_in_the_models_own_template(vendor: Callable[[str], Any]) -> None:
    """Of each sample, what is trained stands after what serving feeds for it."""
    tokenizer = vendor("Qwen-Qwen3")
    plain = Sample((Message("user", "One?"), Message("assistant", "1")))
    told = {}
    for enable in (True, False, None):
        template = load_template(TemplateOptions(enable_thinking=enable), copy.deepcopy(tokenizer))
        told[enable] = [text_of(template, sample) for sample in (ASKED, plain)]
        fed = tokenizer.decode(template.prompt_ids([Message("user", "One?")]))
        assert ("<think>\n\n</think>" in fed) == (not enable)
        if enable is not True:
            assert told[enable][1].startswith(fed)
    assert "Hm." in told[True][0] and "Hm." in told[None][0]
    assert "Hm." not in told[False][0]
    assert "<think>\n\n</think>\n\n1" in told[None][1]


@pytest.mark.parametrize("name", ["templates.md", "templates_zh.md"])
def test_the_example_of_the_docs(name: str, tmp_path: Path, tokenizer: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    template = load_template(TemplateOptions(template=str(tmp_path / "mine.yaml")), tokenizer)
    assert text_of(template, Sample((Message("user", "a"), Message("assistant", "b")))).startswith("<|im_start|>system\nYou are brief.")
    assert all(f"`{dialect}`" in text for dialect in DIALECTS.names())
