"""The model's own template: what is learnt stands after exactly what serving feeds, for many vendors' templates."""

import copy
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from finery.data.jinja import JinjaTemplate
from finery.data.rows.base import RowOptions
from finery.data.rows.chat import Chat
from finery.data.sample import BadRecord, Message, Sample
from finery.data.template import TemplateOptions
from finery.errors import UserError

Vendor = Callable[[str], Any]

# The token that closes an answer, and how many rows three rounds become: 1 where history stands, 3 where it is rewritten.
VENDORS = {
    "Qwen-Qwen2.5": ("<|im_end|>", 1),
    "Qwen-Qwen3": ("<|im_end|>", 3),
    "Qwen-QwQ": ("<|im_end|>", 3),
    "MiMo-VL": ("<|im_end|>", 1),
    "poolside-Laguna": ("</assistant>", 1),
    "inclusionai-ling": ("<|role_end|>", 1),
    "GLM-4.6": ("<|user|>", 1),
    "GLM-4.7-Flash": ("<|user|>", 3),
    "HuggingFaceTB-SmolLM3": ("<|im_end|>", 1),
    "LFM2.5": ("<|im_end|>", 1),
    "meta-llama-Llama-3.1": ("<|eot_id|>", 1),
    "meetkai-functionary": ("<|eot_id|>", 1),
    "deepseek-ai-DeepSeek-R1-Distill-Llama": ("<｜end▁of▁sentence｜>", 3),
    "Apertus": ("<|assistant_end|>", 1),
    "Bielik": ("<|im_end|>", 1),
    "Mistral-Small-3.2": ("</s>", 1),
    "mistralai-Ministral-3": ("</s>", 1),
    "mistralai-Mistral-Nemo": ("</s>", 1),
    "MiniMax-M1": ("<end_of_sentence>", 1),
    "MiniMax-M2": ("[e~[", 3),
    "ibm-granite": ("<|end_of_text|>", 1),
    "GigaChat3-": ("<|message_sep|>", 1),
    "NVIDIA-Nemotron": ("<SPECIAL_12>", 3),
    "microsoft-Phi-3.5": ("<|end|>", 1),
}


@pytest.fixture(scope="module")
def own(vendor: Vendor) -> Callable[[str], JinjaTemplate]:
    """A vendor's template, probed once."""
    made: dict[str, JinjaTemplate] = {}

    def get(name: str) -> JinjaTemplate:
        if name not in made:
            made[name] = JinjaTemplate(vendor(name))
        return made[name]

    return get


def talk(*texts: str, system: str = "") -> Sample:
    """Questions and answers in turn."""
    return Sample(tuple(Message("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)), system)


def conversations(stop: str) -> dict[str, Sample]:
    """What is hard about conversations; `stop` is the text of the token that closes an answer."""
    return {
        "one round": talk("Hi there?", "Hello."),
        "system": talk("Hi there?", "Hello.", system="Be terse."),
        "three rounds": talk("One?", "First.", "Two?", "Second.", "Three?", "Third."),
        "three with system": talk("One?", "First.", "Two?", "Second.", "Three?", "Third.", system="Be terse."),
        "the same again": talk("One?", "First.", "One?", "First."),
        "an empty answer": talk("One?", "", "Two?", "Second."),
        "the stop token in the text": talk("One?", f"a {stop} b", f"Two {stop}?", f"c {stop}"),
        "other scripts": talk("你是谁？", "我是 café 🙂 क", "é", "naïve"),
        "white space around": talk(" One? ", "  lead and trail  ", "\nTwo\n", "\n\nnew\nline\n\n"),
        "a thought": talk("One?", "<think>\nhm\n</think>\n\nYes.", "Two?", "<think>\nhum\n</think>\n\nNo."),
    }


def squashed(text: str) -> str:
    """Without white space, which templates trim and some tokenizers swallow."""
    return "".join(text.split())


def see(template: JinjaTemplate, sample: Sample) -> list[str]:
    """Check a sample's rows against serving; returns the learnt text of each answer."""
    rows = template.encode(sample)
    answers = [place for place, message in enumerate(sample.messages) if message.role in ("assistant", "function")]
    learnt: list[str] = []
    for turns in rows:
        before: list[int] = []
        for turn in turns:
            before += turn.source
            assert before == template.prompt_ids(list(sample.messages[: answers[len(learnt)]]), sample.system, sample.tools)
            assert turn.target[-1] in template.stop_ids
            learnt.append(str(template.tokenizer.decode(turn.target)))
            before += turn.target
        assert [bool(turn.tail) for turn in turns[:-1]] == [False] * (len(turns) - 1)
    assert len(learnt) == len(answers)
    return learnt


@pytest.mark.parametrize("name", VENDORS)
def test_what_is_learnt_stands_after_what_serving_feeds(own: Callable[[str], JinjaTemplate], name: str) -> None:
    template = own(name)
    stop, num_rows = VENDORS[name]
    assert template.tokenizer.convert_tokens_to_ids(stop) in template.stop_ids
    refused = []
    for kind, sample in conversations(stop).items():
        try:
            learnt = see(template, sample)
        except BadRecord as error:
            refused.append(f"{kind}: {error}")
            continue
        for message, text in zip(sample.messages[1::2], learnt, strict=True):
            wanted = message.content.rpartition("</think>")[2] if kind == "a thought" else message.content
            assert squashed(wanted) in squashed(text), kind
            assert text.endswith(stop), kind
    # Mistral's template raises for an empty answer; nothing else is refused by any
    assert all(reason.startswith("an empty answer: the model's chat template refuses it") for reason in refused)
    assert not refused or "Ministral" in name
    assert len(template.encode(conversations(stop)["three rounds"])) == num_rows


@pytest.mark.parametrize("name", [name for name, (_, num_rows) in VENDORS.items() if num_rows == 1])
def test_a_row_is_what_transformers_renders(own: Callable[[str], JinjaTemplate], name: str) -> None:
    """Token for token, and at most the closing token more, where a template leaves the last answer open."""
    template = JinjaTemplate(own(name).tokenizer, TemplateOptions(split_special_tokens=False))
    stop = template.tokenizer.convert_tokens_to_ids(VENDORS[name][0])
    for kind in ("one round", "three rounds", "the same again", "the stop token in the text", "other scripts"):
        sample = conversations(VENDORS[name][0])[kind]
        (turns,) = template.encode(sample)
        ids = [id for turn in turns for id in (*turn.source, *turn.target, *turn.tail)]
        messages = [{"role": message.role, "content": message.content} for message in sample.messages]
        whole = template.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids in (whole, [*whole, stop])


def test_an_end_that_only_the_history_shows(own: Callable[[str], JinjaTemplate]) -> None:
    """GLM writes nothing after an answer: the next message's marker is what it stops at."""
    template = own("GLM-4.6")
    (turns,) = template.encode(talk("One?", "First.", "Two?", "Second."))
    assert [template.tokenizer.decode(turn.target) for turn in turns] == [
        "\n<think></think>\nFirst.<|user|>",
        "\n<think></think>\nSecond.<|user|>",
    ]


def test_what_follows_the_end_of_the_last_answer_is_not_learnt(own: Callable[[str], JinjaTemplate]) -> None:
    template = own("microsoft-Phi-3.5")
    (turns,) = template.encode(talk("One?", "First."))
    assert template.tokenizer.decode(list(turns[0].tail)) == "<|endoftext|>"
    assert template.tokenizer.decode(own("Qwen-Qwen2.5").encode(talk("One?", "First."))[0][0].tail[0]) != "<|im_end|>"


def test_a_dropped_thought_makes_a_row_of_each_answer(own: Callable[[str], JinjaTemplate]) -> None:
    template = own("Qwen-Qwen3")
    sample = conversations("")["a thought"]
    first, second = template.encode(sample)
    assert template.tokenizer.decode(first[0].target) == "<think>\nhm\n</think>\n\nYes.<|im_end|>"
    assert "hm" not in template.tokenizer.decode(second[0].source)
    assert template.tokenizer.decode(second[0].target) == "<think>\nhum\n</think>\n\nNo.<|im_end|>"


def test_a_thought_that_the_prompt_opens(own: Callable[[str], JinjaTemplate]) -> None:
    """R1's prompt ends with <think>, which its finished turns do not show: an answer goes on from there."""
    template = own("deepseek-ai-DeepSeek-R1-Distill-Llama")
    stop = "<｜end▁of▁sentence｜>"
    assert see(template, talk("One?", "Yes.")) == [f"\n</think>\n\nYes.{stop}"]
    assert see(template, talk("One?", "<think>\nhm\n</think>\n\nYes.")) == [f"hm\n</think>\n\nYes.{stop}"]
    glm = own("GLM-4.7-Flash")
    assert see(glm, talk("One?", "Yes.")) == ["</think>Yes.<|user|>"]


TOOLS = '[{"name": "find", "description": "Find.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'
CALL = '{"name": "find", "arguments": {"city": "Oslo"}}'


def tool_talk(call: str = CALL, tools: str = TOOLS) -> Sample:
    turns = (Message("user", "Where?"), Message("function", call), Message("observation", '{"at": 3}'), Message("assistant", "There."))
    return Sample(turns, tools=tools)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("Qwen-Qwen2.5", f"<tool_call>\n{CALL}\n</tool_call><|im_end|>"),
        ("Qwen-Qwen3", f"<think>\n\n</think>\n\n<tool_call>\n{CALL}\n</tool_call><|im_end|>"),
        ("meta-llama-Llama-3.1", '{"name": "find", "parameters": {"city": "Oslo"}}<|eot_id|>'),
        ("LFM2.5", "<|tool_call_start|>[find(city='Oslo')]<|tool_call_end|><|im_end|>"),
        (
            "GLM-4.6",
            "\n<think></think>\n<tool_call>find\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call><|observation|>",
        ),
        ("NVIDIA-Nemotron", f"\n</think>\n\n<TOOLCALL>[{CALL}]</TOOLCALL><SPECIAL_12>"),
    ],
)
def test_calls_are_learnt_as_the_template_writes_them(own: Callable[[str], JinjaTemplate], name: str, call: str) -> None:
    learnt = see(own(name), tool_talk())
    assert learnt[0] == call
    assert "There." in learnt[1]


def test_a_call_behind_the_end_of_the_turn_is_refused(own: Callable[[str], JinjaTemplate]) -> None:
    """GigaChat3's template closes the turn and opens another for the call, which no server would go on to."""
    with pytest.raises(BadRecord, match="ends this turn before its call"):
        own("GigaChat3-").encode(tool_talk())


def test_tools_in_other_spellings_give_the_same_tokens(own: Callable[[str], JinjaTemplate]) -> None:
    template = own("Qwen-Qwen2.5")
    plain = template.encode(tool_talk())
    assert "find" in template.tokenizer.decode(plain[0][0].source)
    as_text = json.dumps({"name": "find", "arguments": '{"city": "Oslo"}'})
    wrapped = json.dumps([{"type": "function", "function": tool} for tool in json.loads(TOOLS)])
    for sample in (tool_talk(call=as_text), tool_talk(call=f"[{CALL}]"), tool_talk(tools=wrapped)):
        assert template.encode(sample) == plain


@pytest.mark.parametrize("call", ["find Oslo", '{"name": "find"}', "[1]", '"find"'])
def test_calls_that_are_none_are_bad_records(own: Callable[[str], JinjaTemplate], call: str) -> None:
    with pytest.raises(BadRecord, match="a function call should be JSON with 'name' and 'arguments'"):
        own("Qwen-Qwen2.5").encode(tool_talk(call))


@pytest.mark.parametrize("name", ["HuggingFaceTB-SmolLM3", "ibm-granite", "microsoft-Phi-3.5"])
def test_calls_that_a_template_drops_are_not_learnt_as_empty_answers(own: Callable[[str], JinjaTemplate], name: str) -> None:
    with pytest.raises(BadRecord, match="does not write tool calls"):
        own(name).encode(tool_talk())


def test_what_a_template_refuses_is_a_bad_record(own: Callable[[str], JinjaTemplate]) -> None:
    mistral = own("Mistral-Small-3.2")
    twice = Sample((Message("user", "a"), Message("user", "b"), Message("assistant", "c")))
    with pytest.raises(BadRecord, match=r"the model's chat template refuses it: .*alternate"):
        mistral.encode(twice)
    assert "alternate" in Chat(mistral, RowOptions(cutoff_len=64)).encode(twice).reason
    with pytest.raises(UserError, match="alternate"):
        mistral.prompt_ids(list(twice.messages[:2]))
    with pytest.raises(BadRecord, match="no answer"):
        mistral.encode(Sample((Message("user", "a"),)))


PREFIX = "{% for message in messages %}"
SUFFIX = "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def test_a_system_text_that_is_refused(tokenizer: Any) -> None:
    refusal = "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = PREFIX + refusal + SUFFIX + PROMPT
    template = JinjaTemplate(tokenizer)
    assert template.encode(talk("a", "b"))
    with pytest.raises(BadRecord, match="refuses it: System role not supported"):
        template.encode(talk("a", "b", system="s"))


@pytest.mark.parametrize(
    "code", ["{{ 'a' + 1 }}", "{{ nothing.at.all }}", "{{ {}['x'].y }}", "{{ 1 / 0 }}", "{{ message.content | round }}"]
)
def test_faults_in_a_template_are_bad_records(tokenizer: Any, code: str) -> None:
    tokenizer.chat_template = PREFIX + "{% if message.content == 'bad' %}" + code + "{% endif %}" + SUFFIX + PROMPT
    template = JinjaTemplate(tokenizer)
    with pytest.raises(BadRecord, match="the model's chat template refuses it"):
        template.encode(talk("bad", "b"))


def test_a_template_that_cannot_write_a_plain_round_is_said_at_once(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('functions are needed') }}"
    with pytest.raises(UserError, match=r"'template' is needed.*functions are needed"):
        JinjaTemplate(tokenizer)


def test_a_template_without_any_end_closes_answers_with_the_end_token(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    template = JinjaTemplate(tokenizer)
    assert template.stop_ids == {tokenizer.eos_token_id}
    assert see(template, talk("a", "First.", "b", "Second.")) == ["First.\n<|im_end|>", "Second.\n<|im_end|>"]


def test_an_answer_whose_first_token_would_merge_with_the_prompt(tokenizer: Any) -> None:
    """Serving feeds the prompt's own tokens, so training must, too, even where the whole text is tokenised otherwise."""
    from tokenizers import Tokenizer

    backend: Tokenizer = tokenizer.backend_tokenizer
    assert backend.encode("Who").tokens != [*backend.encode("W").tokens, *backend.encode("ho").tokens]
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% if not loop.last %}W{% endif %}"
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}W{% endif %}"
    )
    assert see(JinjaTemplate(tokenizer), talk("a", "ho are you")) == ["ho are you<|im_end|>"]


def test_several_templates_are_saved_as_they_are(tokenizer: Any) -> None:
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tool_use": own}
    template = JinjaTemplate(tokenizer)
    assert template.jinja is None
    assert see(template, talk("a", "b")) == ["b<|im_end|>"]


def test_probing_leaves_the_tokenizer_as_it_was(tokenizer: Any) -> None:
    before = copy.deepcopy(tokenizer.get_vocab()), tokenizer.chat_template
    template = JinjaTemplate(tokenizer)
    template.encode(talk("a", "b"))
    assert (tokenizer.get_vocab(), tokenizer.chat_template, template.jinja) == (*before, before[1])


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("Mistral-Small-3.2", "2024-07-26"),
        ("meta-llama-Llama-3.2", "26 Jul 2024"),
        ("ibm-granite-granite-3.3", "July 26, 2024"),
        ("Apertus", "2024-07-26"),
    ],
)
def test_the_date_of_the_day_is_nowhere(vendor: Vendor, name: str, date: str) -> None:
    """Else a run of tomorrow would train another text, and what is cached today would be wrong tomorrow."""
    template = JinjaTemplate(vendor(name))
    tokenizer: Any = template.tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi?"}], tokenize=False, add_generation_prompt=True)
    assert date in text
    assert str(datetime.now().year) not in text or datetime.now().year == 2024
    assert template.prompt_ids([Message("user", "Hi?")]) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert template.jinja == tokenizer.chat_template, "what is saved writes no other"
    assert JinjaTemplate(tokenizer).jinja == template.jinja, "once is enough"
