"""Named templates: slots as the reference has them, tokens by its rule, the same text from the saved Jinja."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finery.data.differences import first_difference
from finery.data.jinja import JinjaTemplate
from finery.data.rows.base import IGNORED, RowOptions
from finery.data.rows.chat import Chat
from finery.data.sample import Message, Sample
from finery.data.slots import Slots, SlotTemplate
from finery.data.template import TemplateOptions, load_template
from named import CONTENT, Plain, Spec, named, text_of

NAMES = ["alpaca", "chatml", "default", "empty", "llama3", "qwen"]


def shortened(plain: Plain, sample: Sample, cutoff_len: int) -> tuple[list[int], list[int]]:
    """Ids and labels by the reference's rule for what is too long."""
    ids: list[int] = []
    labels: list[int] = []
    for source_pieces, target_pieces in plain.turns(sample):
        source, target = ([id for _, piece in pieces for id in piece] for pieces in (source_pieces, target_pieces))
        room = cutoff_len - len(ids)
        if room <= 0:
            break
        if 2 * len(target) < room:
            most = room
        elif 2 * len(source) < room:
            most = room - len(source)
        else:
            most = int(room * len(target) / (len(source) + len(target)))
        num_target = min(most, len(target))
        num_source = min(max(room - num_target, 0), len(source))
        ids += source[:num_source] + target[:num_target]
        labels += [IGNORED] * num_source + target[:num_target]
    return ids, labels


def alpaca_samples(path: Path, count: int) -> list[Sample]:
    """Real rows: single, in pairs as a conversation, with a system text, and with a tool's answer."""
    raw = json.loads(path.read_text(encoding="utf-8"))[:count]
    rounds = [
        (Message("user", "\n".join(filter(None, (row["instruction"], row["input"])))), Message("assistant", row["output"])) for row in raw
    ]
    samples = [Sample(one) for one in rounds]
    samples += [Sample(one + other, "Answer in rhymes.\n{{name}}") for one, other in zip(rounds[::2], rounds[1::2], strict=True)]
    samples += [
        Sample((*one, Message("observation", other[0].content), other[1])) for one, other in zip(rounds[::2], rounds[1::2], strict=True)
    ]
    return samples


@pytest.fixture(scope="session")
def real_samples(shared: Path) -> list[Sample]:
    return alpaca_samples(shared / "data" / "alpaca_en_demo.json", 20) + alpaca_samples(shared / "data" / "alpaca_zh_demo.json", 12)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_labels_equal_the_reference(specs: dict[str, Spec], real_samples: list[Sample], tokenizer: Any, name: str) -> None:
    template = named(name, tokenizer)
    plain = Plain(specs[name], tokenizer)
    for cutoff_len in (4096, 100, 23):
        rows = Chat(template, RowOptions(cutoff_len=cutoff_len))
        for sample in real_samples:
            ids, labels = shortened(plain, sample, cutoff_len)
            encoded = rows.encode(sample)
            if all(label == IGNORED for label in labels[1:]):
                assert encoded.rows == ()
                continue
            (row,) = encoded.rows
            assert (row.ids.tolist(), row.labels.tolist()) == (ids, labels)


def test_tokens_with_a_real_vocabulary(specs: dict[str, Spec], real_samples: list[Sample], vendor: Callable[[str], Any]) -> None:
    tokenizer = copy.deepcopy(vendor("Qwen-Qwen2.5"))
    template = named("qwen", tokenizer)
    plain = Plain(specs["qwen"], tokenizer)
    for sample in real_samples:
        (row,) = Chat(template, RowOptions(cutoff_len=64)).encode(sample).rows
        assert (row.ids.tolist(), row.labels.tolist()) == shortened(plain, sample, 64)


@pytest.mark.parametrize("name", NAMES)
def test_serving_feeds_what_was_trained(real_samples: list[Sample], tokenizer: Any, name: str) -> None:
    template = named(name, tokenizer)
    for sample in real_samples:
        (turns,) = template.encode(sample)
        before: list[int] = []
        for place, turn in enumerate(turns):
            before += turn.source
            assert template.prompt_ids(list(sample.messages[: 2 * place + 1]), sample.system) == before
            before += turn.target


def chat(sample: Sample) -> list[dict[str, str]]:
    """A sample as chat templates read it."""
    roles = {"observation": "tool"}
    messages = [{"role": roles.get(message.role, message.role), "content": message.content} for message in sample.messages]
    return [{"role": "system", "content": sample.system}, *messages] if sample.system else messages


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_jinja_gives_the_same_text(specs: dict[str, Spec], real_samples: list[Sample], tokenizer: Any, name: str) -> None:
    template = named(name, tokenizer)
    assert tokenizer.chat_template == template.jinja
    plain = Plain(specs[name], tokenizer)
    for sample in real_samples:
        rendered = tokenizer.apply_chat_template(chat(sample), tokenize=False)
        assert rendered == plain.text(sample)
        assert rendered == text_of(template, sample)
    question = Sample(real_samples[0].messages[:1], "System")
    rendered = tokenizer.apply_chat_template(chat(question), tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.decode(template.prompt_ids(list(question.messages), "System"))


ODD = ("{", "}", "{{ x }}", "{% if %}", "{# no #}", "'", '"', "\\", "\\n", "\n", "\n\n", "\r\n", "\t", "%}", " ", "é 你 🙂")


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("default_system", ["", "Default."])
def test_jinja_with_odd_characters_in_every_slot(tokenizer: Any, odd: str, default_system: str) -> None:
    around = (f"{odd}<{CONTENT}>{odd}",)
    slots = Slots(
        "odd",
        (odd,),
        (f"S{odd}{CONTENT}{odd}",),
        around,
        (f"A{CONTENT}", "{eos}", odd),
        (f"O{odd}", CONTENT),
        default_system=f"{default_system}{odd}" if default_system else "",
    )
    template = SlotTemplate(slots, tokenizer)
    tokenizer.chat_template = template.jinja
    round_ = (Message("user", f"u{odd}"), Message("assistant", f"{odd}a"))
    for sample in (
        Sample(round_),
        Sample(round_, f"s{odd}"),
        Sample((*round_, Message("observation", odd), Message("assistant", "b")), "s"),
    ):
        assert tokenizer.apply_chat_template(chat(sample), tokenize=False) == text_of(template, sample)


def test_an_empty_system_message_counts_as_none(tokenizer: Any) -> None:
    for name in ("qwen", "chatml"):
        template = named(name, tokenizer)
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": "a"}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered == tokenizer.decode(template.prompt_ids([Message("user", "a")], ""))


def bare(tokenizer: Any) -> Any:
    """The tokenizer without any special token of its own."""
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = None
    return tokenizer


def test_a_tokenizer_without_end_and_pad_gets_them(tokenizer: Any) -> None:
    template = named("default", bare(tokenizer))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert template.stop_ids == {tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def test_a_missing_token_is_left_out(tokenizer: Any) -> None:
    with_bos = named("llama3", copy.deepcopy(tokenizer)).prompt_ids([Message("user", "a")])
    tokenizer.bos_token = None
    assert named("llama3", tokenizer).prompt_ids([Message("user", "a")]) == with_bos[1:]


def test_stop_words_become_tokens(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    size = len(tokenizer)
    template = named("llama3", tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|eot_id|>", "<|endoftext|>")
    assert len(tokenizer) == size + 2
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|eom_id|>")]
    assert template.stop_ids == set(ids)
    assert tokenizer.encode("a<|eom_id|>", add_special_tokens=False)[-1] == ids[1]
    assert {"<|mine|>", "<|eom_id|>"} <= set(tokenizer.all_special_tokens)


def test_stop_words_that_the_tokenizer_has_add_nothing(tokenizer: Any) -> None:
    size = len(tokenizer)
    template = named("chatml", tokenizer)
    assert len(tokenizer) == size
    assert template.stop_ids == {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>")}


def test_the_end_of_an_answer_is_learnt(tokenizer: Any) -> None:
    for name in ("chatml", "qwen", "llama3", "default", "alpaca"):
        template = named(name, tokenizer)
        ((turn,),) = template.encode(Sample((Message("user", "a"), Message("assistant", "b"))))
        assert template.stop_ids & set(turn.target), name


def test_a_template_travels_to_another_process(tokenizer: Any) -> None:
    """Workers that are spawned, as on macOS and Windows, get it pickled."""
    sample = Sample((Message("user", "a"), Message("assistant", "b")), "s")
    for template in (named("qwen", tokenizer), JinjaTemplate(tokenizer)):
        assert pickle.loads(pickle.dumps(template)).encode(sample) == template.encode(sample)


def test_which_template_a_run_gets(tokenizer: Any) -> None:
    assert load_template(TemplateOptions(template="qwen"), copy.deepcopy(tokenizer)).name == "qwen"
    assert isinstance(load_template(TemplateOptions(), tokenizer), JinjaTemplate)
    tokenizer.chat_template = None
    assert load_template(TemplateOptions(), tokenizer).name == "default"
    (finding,) = TemplateOptions(template="lama3").check(None)
    assert "did you mean 'llama3'?" in finding.text


def test_the_wrong_template_is_told_with_the_first_token(vendor: Callable[[str], Any]) -> None:
    """The guide that many users follow trains Qwen2 with llama3's template."""
    tokenizer = copy.deepcopy(vendor("Qwen-Qwen2.5"))
    own = tokenizer.chat_template
    told = first_difference(named("llama3", tokenizer), tokenizer, own)
    assert told.startswith("here token 0 is '<'")
    assert "<|start_header" in told
    assert "there '<|im_start|>' (in '<|im_start|>system\\nYou" in told


def test_the_right_template_is_not_told(vendor: Callable[[str], Any]) -> None:
    tokenizer = copy.deepcopy(vendor("Qwen-Qwen2.5"))
    own = tokenizer.chat_template
    assert first_difference(named("qwen", tokenizer), tokenizer, own) == ""


def test_a_difference_in_the_middle_and_at_the_end(tokenizer: Any) -> None:
    own = tokenizer.chat_template
    chatml = named("chatml", copy.deepcopy(tokenizer))
    assert first_difference(chatml, tokenizer, own) == ""
    told = first_difference(chatml, tokenizer, own.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>'"))
    assert "is 'the end'" in told
    assert "there '<' (in 'nt\\n<thi')" in told
    assert first_difference(named("qwen", copy.deepcopy(tokenizer)), tokenizer, own).startswith("here token 1 is 's")


def test_an_own_template_that_cannot_be_rendered_is_told(tokenizer: Any) -> None:
    template = named("chatml", tokenizer)
    assert "needs tools" in first_difference(template, tokenizer, "{{ raise_exception('needs tools') }}")
    assert "division" in first_difference(template, tokenizer, "{{ 1 // 0 }}")
