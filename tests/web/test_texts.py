"""The pages say everything, in every language, and in that language."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from finery.talks.options import TalkOptions
from finery.web.form import controls
from finery.web.texts import FIRST, FOLDER, LANGUAGES, choices_of, texts

Texts = dict[tuple[str, ...], str]
SCRIPTS: dict[str, set[str]] = {
    "en": set(),
    "zh": {"CJK"},
    "ru": {"CYRILLIC"},
    "ko": {"HANGUL"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC"},
}
"""What each is written in, beside the Latin of names."""
NAMES = re.compile(
    r"Finery|LLaMA Factory|LLaMA Pro|Llama|LoRA|OFT|GaLore|APOLLO|BAdam|SwanLab|YaRN|FlashAttention"
    r"|GGUF|llama\.cpp|Ollama|CPU|GPU|API|JSON|YAML"
)
"""What is called so in every language: a text of nothing else needs no translation."""
EVERY = sorted((path.name.split(".")[0], path.name.split(".")[1]) for path in FOLDER.glob("*.*.yaml"))
"""Part and language of each file."""


def read(part: str, language: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{part}.{language}.yaml").read_text(encoding="utf-8"))


def parts(language: str) -> list[str]:
    return [part for part, spoken in EVERY if spoken == language]


def flat(told: Any, *way: str) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(told, list):
        told = {str(place): entry for place, entry in enumerate(told)}
    if not isinstance(told, dict):
        yield way, told
        return
    for name, entry in told.items():
        yield from flat(entry, *way, name)


def texts_of(part: str, language: str) -> Texts:
    return dict(flat(read(part, language)))


def scripts(text: str) -> set[str]:
    # the mark that lengthens a kana's vowel belongs to two scripts, and is a letter of none
    return {unicodedata.name(letter).split()[0] for letter in text if letter.isalpha() and letter != "ー"}


def names_in(node: yaml.Node, *way: str) -> Iterator[tuple[str, ...]]:
    """As they stand in the file, so that one told twice is seen."""
    for name, entry in node.value if isinstance(node, yaml.MappingNode) else []:
        yield (*way, name.value)
        yield from names_in(entry, *way, name.value)


def test_every_file_is_of_a_part_and_a_language() -> None:
    assert set(EVERY) == {(part, language) for part, _ in EVERY for language in LANGUAGES}
    assert SCRIPTS.keys() == LANGUAGES.keys()


@pytest.mark.parametrize(("part", "language"), EVERY)
def test_a_part_says_the_same_in_every_language(part: str, language: str) -> None:
    """The same texts, with the same values to fill in; what the chat is set with says in English what its own help says."""
    english, told = texts_of(part, FIRST), texts_of(part, language)
    if part == "chat" and language != FIRST:
        english |= {("settings", name, word): "" for name in TalkOptions.model_fields for word in ("label", "info")}
    assert told.keys() == english.keys()
    for way, text in told.items():
        assert fields(text) == fields(english[way]), way


def test_in_english_the_settings_of_the_chat_are_told_once() -> None:
    """By the options themselves, so that every one of them has to."""
    assert all(option.description for option in TalkOptions.model_fields.values())
    assert "settings" not in {group for part in parts(FIRST) for group in read(part, FIRST)}


def fields(text: str) -> set[str]:
    try:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError:  # it shows braces, and nothing is filled in
        return set()


@pytest.mark.parametrize(("part", "language"), EVERY)
def test_every_text_is_one(part: str, language: str) -> None:
    """No bare `yes` or `8` that YAML took for something else, nothing empty, no label too long for its place, nothing said twice."""
    for way, text in texts_of(part, language).items():
        assert all(isinstance(name, str) for name in way), way
        assert isinstance(text, str), way
        assert text and text == text.strip(), way
        assert way[-1] != "label" or len(text) <= 40, way
    node = yaml.compose((FOLDER / f"{part}.{language}.yaml").read_text(encoding="utf-8"))
    assert node is not None
    assert [way for way, times in Counter(names_in(node)).items() if times > 1] == []


@pytest.mark.parametrize(("part", "language"), EVERY)
def test_a_language_is_written_in_its_script(part: str, language: str) -> None:
    own = SCRIPTS[language]
    for way, text in texts_of(part, language).items():
        assert scripts(text) <= own | {"LATIN"}, (way, text)
        if own and scripts(NAMES.sub("", text)):
            assert scripts(text) & own, (way, text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_parts_do_not_speak_over_each_other(language: str) -> None:
    """`texts` lays their groups together."""
    heads = Counter((group, name) for part in parts(language) for group, entries in read(part, language).items() for name in entries)
    assert [head for head, times in heads.items() if times > 1] == []


# ------------------------------------------------------------------ of the controls


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_control_and_section_says_what_it_is(language: str) -> None:
    told = {way: text for part in parts(language) for way, text in texts_of(part, language).items()}
    for control in controls().values():
        way = (control.tab, control.name)
        assert told[*way, "label"] != told[*way, "info"]
        if control.section != "basics":
            assert told["sections", f"{control.tab}.{control.section}"]


def test_nothing_is_told_of_controls_that_are_not_there() -> None:
    told = read("controls", FIRST)
    sections, choices = told.pop("sections"), told.pop("choices")
    assert {f"{tab}.{name}" for tab, entries in told.items() for name in entries} == controls().keys()
    assert sections.keys() <= {f"{control.tab}.{control.section}" for control in controls().values() if control.section != "basics"}
    for id, shown in choices.items():
        assert shown.keys() <= set(controls()[id].choices or ()), id


def test_choices_keep_their_words() -> None:
    """What is shown is a language's, what is set is not."""
    id, words = "train.training_stage", controls()["train.training_stage"].choices or ()
    for language in LANGUAGES:
        shown = choices_of(texts(language), id, words)
        assert [value for _, value in shown] == list(words) != []
        assert all(text != value for text, value in shown)
