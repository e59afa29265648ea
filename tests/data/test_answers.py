"""What a model wrote is read back as what it was trained to write."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from finery.data.answers import dialect_of
from finery.data.dialects import DIALECTS
from finery.data.reading import answer_of, reader_for
from finery.data.sample import Message, Sample
from finery.data.template import Template, TemplateOptions, load_template

TOOLS = json.dumps(
    [{"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
)
CALL = {"name": "weather", "arguments": {"city": "Rome"}}


def read_back(template: Template, message: Message) -> Message:
    """An answer as a model that learnt it writes it, decoded with its special tokens and without its end, and read."""
    turn = template.encode(Sample((Message("user", "Is it cold?"), message), tools=TOOLS))[0][-1]
    stop = next((at for at, id in enumerate(turn.target) if id in template.stop_ids), len(turn.target))
    reader = reader_for(template, turn.source, dialect_of(template), json.loads(TOOLS))
    deltas = [reader.feed(str(template.tokenizer.decode(turn.target[:stop]))), reader.finish()]
    thought, content = ("".join(getattr(delta, name) for delta in deltas) for name in ("thought", "content"))
    return answer_of(thought, content, [call for delta in deltas for call in delta.calls])


@pytest.mark.parametrize("name", DIALECTS.names())
def test_calls_of_every_dialect(name: str, tokenizer: Any) -> None:
    template = load_template(TemplateOptions(template="chatml", tool_format=name), tokenizer)
    read = read_back(template, Message("function", json.dumps(CALL)))
    assert (read.role, json.loads(read.content), read.thought, read.before_calls) == ("function", [CALL], "", "")
    assert read_back(template, Message("assistant", "It is.")) == Message("assistant", "It is.")


@pytest.mark.parametrize("name", ["qwen3", "glm4_moe", "deepseekr1"])
def test_a_thought_and_a_text_before_calls(name: str, tokenizer: Any) -> None:
    template = load_template(TemplateOptions(template=name), tokenizer)
    message = Message("function", json.dumps([CALL, CALL]), "I have to look.", "Let me see.")
    read = read_back(template, message)
    assert (read.role, json.loads(read.content)) == ("function", [CALL, CALL])
    assert (read.thought, read.before_calls) == ("I have to look.", "Let me see.")


VENDORS = {"Qwen-Qwen3-0.6B": "qwen", "GLM-4.6": "glm4_moe", "MiniMax-M2": "minimax2", "meta-llama-Llama-3.1": "llama3", "LFM2.5": "lfm2"}


@pytest.mark.parametrize("vendor_name", VENDORS)
def test_the_own_template_s_dialect_is_found(vendor: Callable[[str], Any], vendor_name: str) -> None:
    template = load_template(TemplateOptions(), copy.deepcopy(vendor(vendor_name)))
    dialect = dialect_of(template)
    assert dialect is not None
    assert isinstance(dialect, DIALECTS[VENDORS[vendor_name]])
    read = read_back(template, Message("function", json.dumps(CALL)))
    assert (read.role, json.loads(read.content)) == ("function", [CALL])


def test_a_template_that_calls_nothing(tokenizer: Any) -> None:
    template = load_template(TemplateOptions(), tokenizer)
    assert dialect_of(template) is None
    assert read_back(template, Message("assistant", "Yes.")) == Message("assistant", "Yes.")


def test_a_word_of_thoughts_within_a_call(tokenizer: Any) -> None:
    template = load_template(TemplateOptions(template="qwen"), tokenizer)
    call = {"name": "weather", "arguments": {"city": "a</think>b"}}
    read = read_back(template, Message("function", json.dumps(call)))
    assert (read.role, json.loads(read.content), read.thought) == ("function", [call], "")
