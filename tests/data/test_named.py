"""All named templates: slots, rendered pieces and masks as the reference's rule has them, for every kind of conversation."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from finery.data.dialects.base import read_calls
from finery.data.formats.sharegpt import split_calls
from finery.data.sample import Message, Sample
from finery.data.slots import Slots
from finery.data.template import template_names
from finery.models.listed import listed_models
from named import CONTENT, Pieces, Plain, Spec, named

TOOL = {
    "name": "find_train",
    "description": "Look up trains",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Arrival city"}}, "required": ["city"]},
}
CALL = json.dumps({"name": "find_train", "arguments": {"city": "Oslo"}})
ASKED = (Message("user", "Hi there?"), Message("assistant", "Hello."))
AGAIN = (Message("user", "你好，\n  and 2 + 2?"), Message("assistant", "It is 4 🙂."))
THOUGHT = (Message("user", "One?"), Message("assistant", "1", thought="Let me see.\nOne."))
TRAIN = (Message("user", "A train?"), Message("function", CALL), Message("observation", "14:05"), Message("assistant", "At 14:05."))
TOOLS = json.dumps([TOOL])
SAMPLES = {
    "plain": Sample(ASKED),
    "system": Sample(ASKED, "Answer in rhymes.\n{{name}}"),
    "several turns": Sample(ASKED + AGAIN + ASKED, "Be brief."),
    "tools": Sample(ASKED + TRAIN, "Be brief.", TOOLS),
    "tools without a system text": Sample(TRAIN, "", TOOLS),
    "a thought": Sample(THOUGHT),
    "thoughts and none": Sample(THOUGHT + ASKED + THOUGHT, "Think."),
    "a thought before a call": Sample((TRAIN[0], replace(TRAIN[1], thought="Look."), *TRAIN[2:]), "", TOOLS),
}
VOCABULARIES = ("Qwen-Qwen2.5", "meta-llama-Llama-3.1", "mistralai-Mistral-Nemo")


def spelled(pieces: list[Any]) -> tuple[str, ...]:
    """The reference's pieces as our files spell them."""
    found = []
    for piece in pieces:
        if isinstance(piece, str):
            found.append(piece)
        elif "token" in piece:
            found.append(f"{{token:{piece['token']}}}")
        elif piece["special"] in ("bos_token", "eos_token"):
            found.append("{" + piece["special"].removesuffix("_token") + "}")
    return tuple(found)


def with_tokens(spec: Spec, tokenizer: Any) -> Any:
    """A tokenizer that has the tokens which a template looks up by name."""
    slots = [piece for slot in ("prefix", "system", "user", "assistant", "observation", "function") for piece in spec[slot]]
    wanted = [piece["token"] for piece in slots if isinstance(piece, dict) and "token" in piece]
    tokenizer.add_special_tokens({"additional_special_tokens": wanted}, replace_extra_special_tokens=False) if wanted else None
    return tokenizer


def test_none_is_missing(specs: dict[str, Spec]) -> None:
    assert set(template_names()) == set(specs)
    assert {model.family_template for model in listed_models().values()} - {None} <= set(template_names())


def test_slots_equal_the_reference(specs: dict[str, Spec]) -> None:
    for name, spec in specs.items():
        slots = Slots.read(name)
        for slot in ("prefix", "system", "user", "assistant"):
            assert getattr(slots, slot) == spelled(spec[slot]), (name, slot)
        assert (slots.user if slots.observation is None else slots.observation) == spelled(spec["observation"]), name
        assert (slots.assistant if slots.function is None else slots.function) == spelled(spec["function"]), name
        for key in ("default_system", "replace_eos", "efficient_eos"):
            assert getattr(slots, key) == spec[key], (name, key)
        for key, theirs in (("stop_words", "stop_words"), ("thought_words", "thought_words")):
            assert list(getattr(slots, key)) == spec[theirs], (name, key)
        assert (slots.tool_format, slots.reasoning) == (spec["function_tool_format"], spec["is_reasoning"]), name


def flat(pieces: Pieces) -> list[int]:
    """The ids of all pieces."""
    return [id for _, ids in pieces for id in ids]


def compare(spec: Spec, tokenizer: Any, samples: dict[str, Sample], **options: Any) -> None:
    """Pieces and masks of some samples, by our template and by the rule."""
    template = named(spec["name"], tokenizer, **options)
    plain = Plain(spec, tokenizer, options.get("enable_thinking", True), options.get("mask_history", False))
    for kind, sample in samples.items():
        (turns,) = template.encode(sample)
        expected = [
            ([id for _, ids in source for id in ids], [id for _, ids in target for id in ids]) for source, target in plain.turns(sample)
        ]
        assert [(turn.source, turn.target) for turn in turns] == expected, (spec["name"], kind, options)


def test_pieces_and_masks_with_a_byte_level_tokenizer(specs: dict[str, Spec], tokenizer: Any) -> None:
    for spec in specs.values():
        compare(spec, with_tokens(spec, copy.deepcopy(tokenizer)), SAMPLES)


CHOICES: list[dict[str, Any]] = [{"enable_thinking": False}, {"enable_thinking": None}, {"mask_history": True}]


@pytest.mark.parametrize("options", [*CHOICES, {"mask_history": True, "enable_thinking": False}])
def test_thoughts_as_the_keys_say(specs: dict[str, Spec], tokenizer: Any, options: dict[str, Any]) -> None:
    for spec in specs.values():
        if spec["is_reasoning"]:
            compare(spec, with_tokens(spec, copy.deepcopy(tokenizer)), SAMPLES, **options)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_pieces_and_masks_with_real_vocabularies(specs: dict[str, Spec], vendor: Callable[[str], Any], vocabulary: str) -> None:
    """Templates whose tokens the vocabulary lacks get them, as a run would give them. One copy for all: a large one takes long to copy."""
    own = copy.deepcopy(vendor(vocabulary))
    for spec in specs.values():
        compare(spec, with_tokens(spec, own), SAMPLES)


def as_chat(sample: Sample) -> list[dict[str, Any]]:
    """A sample as chat templates read it."""
    found: list[dict[str, Any]] = [{"role": "system", "content": sample.system}] if sample.system else []
    for message in sample.messages:
        if message.role == "function":
            found.append(
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": json.loads(message.content)}]}
            )
        else:
            found.append({"role": {"observation": "tool"}.get(message.role, message.role), "content": message.content})
        if message.thought:
            found[-1]["reasoning_content"] = message.thought
    return found


@pytest.mark.parametrize("options", [{}, *CHOICES])
def test_the_saved_jinja_gives_the_same_text(specs: dict[str, Spec], tokenizer: Any, options: dict[str, Any]) -> None:
    for spec in specs.values():
        if options and not spec["is_reasoning"]:
            continue
        own = with_tokens(spec, copy.deepcopy(tokenizer))
        template = named(spec["name"], own, **options)
        plain = Plain(spec, own, options.get("enable_thinking", True), options.get("mask_history", False))
        for kind, sample in SAMPLES.items():
            tools = json.loads(sample.tools) if sample.tools else None
            messages = as_chat(sample)
            assert own.apply_chat_template(messages, tools=tools, tokenize=False) == plain.text(sample), (spec["name"], kind, options)
            rendered = own.apply_chat_template(messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True)
            fed = template.prompt_ids(list(sample.messages[:-1]), sample.system, sample.tools)
            assert own.decode(fed, clean_up_tokenization_spaces=False) == rendered, (spec["name"], kind, options)


@pytest.mark.parametrize("options", [{}, *CHOICES])
def test_serving_feeds_what_was_trained(specs: dict[str, Spec], tokenizer: Any, options: dict[str, Any]) -> None:
    """Before each answer that is learnt; where answers with and without thoughts are, a prompt asks for one without."""
    for spec in specs.values():
        template = named(spec["name"], with_tokens(spec, copy.deepcopy(tokenizer)), **options)
        for kind, sample in SAMPLES.items():
            (turns,) = template.encode(sample)
            before: list[int] = []
            for place, turn in enumerate(turns):
                before += turn.source
                learnt = not options.get("mask_history") or place == len(turns) - 1
                asked = options.get("enable_thinking", True) is not None or not sample.messages[2 * place + 1].thought
                if learnt and (asked or not spec["is_reasoning"]):
                    fed = template.prompt_ids(list(sample.messages[: 2 * place + 1]), sample.system, sample.tools)
                    assert fed == before, (spec["name"], kind, options)
                before += turn.target


def test_a_slot_holds_the_content_once(specs: dict[str, Spec]) -> None:
    for name in specs:
        slots = Slots.read(name)
        for slot in (slots.system, slots.user, slots.assistant, slots.observation or slots.user, slots.function or slots.assistant):
            assert sum(piece.count(CONTENT) for piece in slot) == 1, name


@pytest.mark.parametrize(("words", "name"), [("<tool_call> </tool_call>", "qwen"), ("<|tool_call_start|> <|tool_call_end|>", "lfm2")])
def test_calls_that_the_data_write_in_words(tokenizer: Any, words: str, name: str) -> None:
    """They are read, and written in the dialect of the template."""
    opening, closing = words.split()
    content, before = split_calls(f"Wait.\n{opening}{CALL}{closing}", "value")
    assert (json.loads(content), before.strip()) == (json.loads(CALL), "Wait.")
    template = named(name, tokenizer)
    (turns,) = template.encode(Sample((Message("user", "A train?"), Message("function", content, before_calls=before.strip()))))
    assert template.dialect.write(read_calls(CALL)) in tokenizer.decode(turns[0].target)


@pytest.mark.parametrize("before", ["Wait.", "<think>\nHm.\n</think>\n\n", "Line.\n"])
def test_what_is_said_before_a_call_is_saved_in_the_jinja_too(tokenizer: Any, before: str) -> None:
    template = named("qwen3", tokenizer)
    sample = Sample((Message("user", "A train?"), Message("function", CALL, before_calls=before)))
    chat = [
        {"role": "user", "content": "A train?"},
        {"role": "assistant", "content": before, "tool_calls": [{"function": json.loads(CALL)}]},
    ]
    (turns,) = template.encode(sample)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == tokenizer.decode(turns[0].source + turns[0].target)
