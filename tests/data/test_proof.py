"""The proof: it finds nothing on sound templates, and every fault that is put into one."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tokenizers import AddedToken

from finery.checks.template import nasty_set, prepared
from finery.data.differences import difference
from finery.data.jinja import JinjaTemplate
from finery.data.proof import Proof
from finery.data.rows.base import IGNORED, Encoded, Row, RowOptions
from finery.data.sample import Message, Sample
from finery.data.slots import Slots
from finery.data.template import Template, TemplateOptions, Turn, load_template, template_names
from finery.models.new_tokens import TokenOptions

TALK = Sample((Message("user", "One?"), Message("assistant", "First."), Message("user", "Two?"), Message("assistant", "Second.")))
TOOLS = json.dumps([{"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}])
CALLS = Sample(
    (
        Message("user", "Look."),
        Message("function", '{"name": "look", "arguments": {}}'),
        Message("observation", "It."),
        Message("assistant", "It is there."),
    ),
    tools=TOOLS,
)
THOUGHT = Sample((Message("user", "One?"), Message("assistant", "Yes.", thought="Hm.")))


def proof_of(tokenizer: Any, mask_history: bool = False, train_on_prompt: bool = False, **options: Any) -> Proof:
    """The proof as a run prepares it: with what is saved and loaded again."""
    chosen = TemplateOptions.model_validate(options)
    run = SimpleNamespace(
        model=SimpleNamespace(trust_remote_code=False, model_name_or_path="x"), tokens=TokenOptions(), template=chosen,
        rows=RowOptions(cutoff_len=64, mask_history=mask_history, train_on_prompt=train_on_prompt),
    )  # fmt: skip
    proof, faults = prepared(run, load_template(chosen, tokenizer, mask_history=mask_history), Path())
    assert faults == []
    return proof


def told(proof: Proof, sample: Sample = TALK, fatal: bool = True) -> list[str]:
    """What is found about a conversation."""
    return [fault.what for fault in proof.of(sample).faults if fault.fatal is fatal]


# ------------------------------------------------------------------ sound templates


THINKING = ["qwen3", "deepseekr1", "glm4_moe", "seed_oss"]
WAYS: list[dict[str, Any]] = [{"enable_thinking": False}, {"enable_thinking": None}, {"mask_history": True}]


@pytest.mark.parametrize(
    ("name", "options"), [(name, {}) for name in template_names()] + [(name, way) for name in THINKING for way in WAYS]
)
def test_named_templates_are_proved_on_the_hard_set(name: str, options: dict[str, Any], tokenizer: Any) -> None:
    needed = re.findall(r"{token:(.+?)}", repr(Slots.read(name)))
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in needed], special_tokens=True)
    proof = proof_of(tokenizer, template=name, **options)
    for title, sample in nasty_set(proof.template):
        proved = proof.of(sample)
        assert [fault for fault in proved.faults if fault.fatal] == [], title
        assert proved.way == "row" or proved.reason == "this tool format has one call a turn, found 2"


@pytest.mark.parametrize("options", [{}, {"default_system": "Be kind."}, {"enable_thinking": None}, {"mask_history": True}], ids=str)
def test_the_own_template_is_proved_on_the_hard_set(options: dict[str, Any], tokenizer: Any) -> None:
    proof = proof_of(tokenizer, **options)
    ways = [proof.of(sample) for _, sample in nasty_set(proof.template)]
    assert {fault for proved in ways for fault in proved.faults if fault.fatal} == set()
    assert {proved.way for proved in ways} == {"row", "refused"}
    assert {proved.reason for proved in ways} == {"", "the model's chat template does not write tool calls"}


def test_a_user_s_own_file_is_proved(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"like": "chatml", "default_system": "Be brief.", "tool_format": "glm4"}))
    proof = proof_of(tokenizer, template=str(file))
    for title, sample in nasty_set(proof.template):
        assert told(proof, sample) == [], title


def test_what_is_saved_with_a_named_template_is_served_by_it(tokenizer: Any, tmp_path: Path) -> None:
    """Also where the key is left out later, until a key or a hand changes what is written."""
    load_template(TemplateOptions(template="alpaca"), tokenizer)
    assert load_template(TemplateOptions(), tokenizer).name == "alpaca"
    assert load_template(TemplateOptions(default_system="Be kind."), copy.deepcopy(tokenizer)).name == "the model's own"
    tokenizer.chat_template = tokenizer.chat_template.replace("### Response", "### Answer")
    assert load_template(TemplateOptions(), tokenizer).name == "the model's own"


# ------------------------------------------------------------------ faults


class Broken:
    """A proof of a sound template, part of which is then exchanged."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        self.proof = proof_of(tokenizer, **options)
        self.template: Any = self.proof.template

    def encodes(self, change: Callable[[list[list[Turn]]], list[list[Turn]]]) -> list[str]:
        """What is found where the template gives other turns."""
        turns = type(self.template).turns

        def changed(sample: Sample) -> Any:
            return change((yield from turns(self.template, sample)))

        self.template.turns = changed
        return told(self.proof)


@pytest.fixture(params=["auto", "chatml"])
def broken(request: pytest.FixtureRequest, tokenizer: Any) -> Broken:
    return Broken(tokenizer, template=request.param)


def with_turn(conversations: list[list[Turn]], **parts: Any) -> list[list[Turn]]:
    """The last turn with other parts."""
    *before, last = conversations[0]
    return [[*before, Turn(**{**vars(last), **parts})]]


def test_another_prompt_than_what_is_fed(broken: Broken) -> None:
    (said, *_) = broken.encodes(lambda all: with_turn(all, source=[*all[0][-1].source, 300]))
    assert said.startswith("answer 3 is learnt after other tokens than what chat and API feed: in training token ")
    assert "(in 'nt\\n" in said.replace("\\\\n", "\\n"), "the text around the difference is shown"


def test_an_answer_without_an_end(broken: Broken) -> None:
    target = [id for id in broken.template.encode(TALK)[0][-1].target if id not in broken.template.stop_ids]
    said = broken.encodes(lambda all: with_turn(all, target=target, tail=()))
    said += told(broken.proof, fatal=False)
    assert any(line.startswith("nothing that is learnt ends generation: the answer ends with '") for line in said)


def test_more_after_the_end(broken: Broken) -> None:
    said = broken.encodes(lambda all: with_turn(all, target=[*all[0][-1].target, 301]))
    assert any(line.startswith("after the token that ends generation, more is learnt: ") for line in said)


def test_served_otherwise_than_trained(tokenizer: Any) -> None:
    proof = proof_of(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("\\n", "")
    broken = Proof(proof.template, JinjaTemplate(other), proof.saved)
    assert told(broken)[0].startswith("answer 1 is learnt after other tokens than what is fed when the saved folder is served: ")
    broken = Proof(proof.template, proof.served, other)
    assert told(broken)[0].startswith("the saved chat template, tokenised by transformers, gives other tokens: in training token ")
    assert told(broken)[-1].startswith("the conversation as a whole is not what transformers renders: ")
    other.chat_template = "{{ nothing.at_all }}"
    assert told(broken)[0] == "the saved chat template cannot be rendered: 'nothing' is undefined"


def test_saved_jinja_that_writes_another_text(tokenizer: Any) -> None:
    proof = proof_of(tokenizer, template="chatml")
    proof.saved.chat_template = str(proof.saved.chat_template).replace("user\\n", "user: ")
    assert told(proof)[0].startswith("the saved chat template writes another text: '_start|>user: One?")
    assert len(told(proof)) == 3, "each prompt, and the whole"


def test_other_stop_tokens_when_served(tokenizer: Any) -> None:
    proof = proof_of(tokenizer)
    proof.served.stop_ids = frozenset({1})
    assert [fault.what for fault in proof.of_all()] == ["answers end at the tokens [2], and at [1] when served from the saved folder"]


def test_labels_that_are_not_the_answers(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = broken.proof._rows.encode

    def shifted(sample: Sample) -> Encoded:
        (row,) = encode(sample).rows
        labels = row.labels.copy()
        labels[0], labels[-1] = row.ids[0], IGNORED
        return Encoded((Row(row.ids, labels),))

    monkeypatch.setattr(broken.proof._rows, "encode", shifted)
    (said,) = told(broken.proof)
    assert said.startswith("the label of token 0 is ")
    assert "should be -100 (at '" in said


def test_a_row_of_other_tokens(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = broken.proof._rows.encode
    monkeypatch.setattr(
        broken.proof._rows, "encode", lambda sample: Encoded(tuple(Row(r.ids[1:], r.labels[1:]) for r in encode(sample).rows))
    )
    assert told(broken.proof)[0].startswith("the row has other tokens than its turns: here token 0 is ")


def test_the_label_of_an_end_that_stands_elsewhere(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`efficient_eos`: the end is learnt where the next question begins."""
    proof = proof_of(tokenizer, template="gemma2")
    assert proof.template.late_end is not None
    assert told(proof) == []
    encode = proof._rows.encode

    def without(sample: Sample) -> Encoded:
        (row,) = encode(sample).rows
        labels = row.labels.copy()
        labels[row.labels != row.ids] = IGNORED
        return Encoded((Row(row.ids, labels),))

    monkeypatch.setattr(proof._rows, "encode", without)
    assert "is -100 and should be 2" in told(proof)[0]


# ------------------------------------------------------------------ what is told though it stands


def test_seams_are_named_with_both_readings(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "glued.yaml"
    file.write_text(yaml.safe_dump({"user": "Q: {{content}} qui", "assistant": ["ck {{content}}", "{eos}"]}))
    proof = proof_of(tokenizer, template=str(file))
    assert told(proof) == []
    (said, *_) = told(proof, fatal=False)
    assert said.startswith("a seam after 'i': piece by piece token 7 is ' qu'")
    assert "as one text" in said
    assert len(told(proof, fatal=False)) == 1, "each seam once a conversation"


def test_no_seams_between_special_tokens(tokenizer: Any) -> None:
    assert told(proof_of(tokenizer, template="chatml"), fatal=False) == []


def test_a_thought_that_the_template_strips(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'].split('</think>')[-1].strip() +")
    (said,) = told(proof_of(tokenizer), THOUGHT, fatal=False)
    assert said == "the template strips the thought of this answer: 'Hm.' is not learnt"
    assert told(proof_of(tokenizer, enable_thinking=False), THOUGHT, fatal=False) == [], "a key has asked for that"


@pytest.mark.parametrize("name", ["phi4_mini", "seed_oss", "qwen", "llama3"])
def test_tools_in_other_spellings_are_written_alike(name: str, tokenizer: Any) -> None:
    """Bare or wrapped, and however the data space their JSON: what serving gets is the same."""
    proof = proof_of(tokenizer, template=name)
    (tool,) = json.loads(TOOLS)
    spellings = [TOOLS, TOOLS.replace(": ", ":  "), json.dumps([{"type": "function", "function": tool}])]
    found = [proof._rows.encode(Sample(CALLS.messages, tools=tools)).rows[0].ids.tolist() for tools in spellings]
    assert found[0] == found[1] == found[2]
    assert all(told(proof, Sample(CALLS.messages, tools=tools)) == [] for tools in spellings)


@pytest.mark.parametrize("name", ["empty", "gemma4", "youtu"])
def test_named_templates_that_write_no_end_are_told(name: str, tokenizer: Any) -> None:
    """As the reference has them: they are trained as asked."""
    proof = proof_of(tokenizer, template=name)
    assert told(proof, CALLS) == []
    assert told(proof, CALLS, fatal=False)[0].startswith("nothing that is learnt ends generation: the answer ends with ")


def test_an_answer_that_spells_the_end(tokenizer: Any) -> None:
    sample = Sample((Message("user", "What ends it?"), Message("assistant", "This: <|im_end|> does.")))
    assert told(proof_of(copy.deepcopy(tokenizer)), sample) == []
    asked = proof_of(tokenizer, template="chatml", split_special_tokens=False)
    assert told(asked, sample) == []
    assert told(asked, sample, fatal=False) == ["the answer spells '<|im_end|>', at which generation stops"]


def test_spelled_words_that_become_tokens(broken: Broken) -> None:
    sample = Sample((Message("user", "What is <|im_end|>?"), Message("assistant", "An end.")))
    assert told(broken.proof, sample) == []
    marked = type(broken.template).marked
    broken.template.marked = lambda given: given if given is sample else marked(broken.template, given)
    neutral = marked(broken.template, sample)
    broken.proof._neutral = lambda given: _without_mark(neutral) if given is sample else None  # type: ignore[method-assign]
    assert any(line.startswith("words that spell special tokens are read as tokens: ") for line in told(broken.proof, sample))


def _without_mark(sample: Sample) -> Sample:
    return Sample(tuple(Message(m.role, m.content.replace("\ufdd0", "·")) for m in sample.messages))


def test_answers_that_are_refused(tokenizer: Any) -> None:
    proved = proof_of(tokenizer).of(CALLS)
    assert (proved.way, proved.reason, proved.faults) == ("refused", "the model's chat template does not write tool calls", ())


def test_rows_per_turn(tokenizer: Any) -> None:
    """A template that takes old thoughts out: each answer is a row, and each row is proved."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = Sample(tuple(Message(m.role, f"<think>Hm.</think>{m.content}" if m.role == "assistant" else m.content) for m in TALK.messages))
    proof = proof_of(tokenizer)
    proved = proof.of(talk)
    assert (proved.way, proved.faults) == ("turns", ())
    assert [len(rows) for rows in (proof._rows.encode(talk).rows, proof._rows.encode(TALK).rows)] == [2, 1]
    read = Sample(tuple(Message(m.role, m.content, train=False if m.content.endswith("First.") else None) for m in talk.messages))
    assert proof.of(read).faults == ()
    assert proof_of(tokenizer, mask_history=True).of(talk).faults == ()


def test_the_first_difference_with_the_text_around_it(tokenizer: Any) -> None:
    ours, theirs = tokenizer("one two")["input_ids"], tokenizer("one too")["input_ids"]
    assert difference(tokenizer, ours, theirs).startswith("here token ")
    assert difference(tokenizer, ours, ours[:1]).endswith("there 'the end' (in 'o')")


def test_generation_marks_are_compared(vendor: Callable[[str], Any]) -> None:
    """LFM2.5 marks its answers rightly; poolside's marks begin before the prompt ends, and are not followed."""
    proof = proof_of(copy.deepcopy(vendor("LFM2.5")))
    assert isinstance(proof.template, JinjaTemplate)
    assert proof.template.marks_are_right
    assert proof.of(TALK).faults == ()
    answers_of = proof.template.answers_of
    proof.template.answers_of = lambda sample: [not one for one in answers_of(sample) or ()]  # type: ignore[method-assign]
    assert [fault.kind for fault in proof.of(TALK).faults] == ["marks", "marks"]
    other = JinjaTemplate(copy.deepcopy(vendor("poolside-Laguna")))
    assert not other.marks_are_right
    assert other.answers_of(TALK) is None


def test_templates_without_pieces_have_no_texts(tokenizer: Any) -> None:
    template: Template = JinjaTemplate(tokenizer)
    assert template.texts(TALK, prompt=True) is None


def test_marks_that_were_not_tried_are_not_asked(vendor: Callable[[str], Any]) -> None:
    """They were probed on plain answers: calls and thoughts may stand outside them."""
    template = JinjaTemplate(copy.deepcopy(vendor("LFM2.5")))
    assert template.answers_of(TALK) is not None
    assert template.answers_of(CALLS) is None
    assert template.answers_of(THOUGHT) is None


def test_questions_that_are_learnt_too(tokenizer: Any) -> None:
    for name in ("chatml", "gemma2"):
        assert told(proof_of(copy.deepcopy(tokenizer), train_on_prompt=True, template=name)) == []


@pytest.mark.parametrize("text", ["a</think>b", "<think>a", "<think>a</think>b<think>c</think>d", "</think>"])
@pytest.mark.parametrize("thinks", [True, False, None])
def test_halves_of_thoughts(text: str, thinks: bool | None, tokenizer: Any) -> None:
    """Data that were cut, or that leave the opening word to the prompt."""
    proof = proof_of(tokenizer, template="qwen3", enable_thinking=thinks)
    talk = Sample((Message("user", "One?"), Message("assistant", text), Message("user", "Two?"), Message("assistant", "Yes.")))
    assert told(proof, talk) == []


def test_texts_that_the_template_drops(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'][:5] +")
    assert told(proof_of(tokenizer), fatal=False) == ["the template strips a part of this answer: 'Second.' is not learnt"] * 2 or told(
        proof_of(tokenizer), fatal=False
    ) == [
        "the template strips a part of this answer: 'First.' is not learnt",
        "the template strips a part of this answer: 'Second.' is not learnt",
    ]


def test_a_template_that_writes_nothing_of_a_call(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[-1]['content'] }}{{ eos_token }}"
    assert proof_of(tokenizer).of(CALLS).way == "refused"


def test_long_conversations_are_proved_to_their_end(tokenizer: Any) -> None:
    proof = proof_of(tokenizer)
    talk = Sample(TALK.messages * 15)
    assert told(proof, talk) == []
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("\\n", "")
    broken = Proof(proof.template, JinjaTemplate(other), proof.saved)
    assert len(told(broken, talk)) == 8, "the first four answers and the last four"


def test_refusals_are_told_without_our_marks(tokenizer: Any) -> None:
    proof = proof_of(tokenizer, template="glm4_moe")
    call = Message("function", json.dumps({"name": "look<|im_end|>", "arguments": {}}))
    proved = proof.of(Sample((Message("user", "Look."), call), tools=TOOLS))
    assert proved.way == "refused"
    assert "'look<|im_end|>'" in proved.reason


def test_a_name_that_a_user_s_own_file_shares_with_ours(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "llama3.yaml").write_text("like: chatml\n")
    mine = load_template(TemplateOptions(template=str(tmp_path / "llama3.yaml")), tokenizer)
    again = load_template(TemplateOptions(), tokenizer)
    assert (again.name, again.stop_ids) == ("the model's own", frozenset({2}))
    assert mine.stop_ids >= again.stop_ids
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_key_that_changes_a_saved_template_leaves_the_tokenizer_alone(tokenizer: Any) -> None:
    load_template(TemplateOptions(template="llama3"), tokenizer)
    before = (tokenizer.eos_token, len(tokenizer), tokenizer.chat_template.count("Finery"))
    assert load_template(TemplateOptions(tool_format="qwen"), tokenizer).name == "the model's own"
    assert (tokenizer.eos_token, len(tokenizer), tokenizer.chat_template.count("Finery")) == before
