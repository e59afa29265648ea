"""A talk as a page shows it: tags are text, whatever they stand in, and every language says everything."""

from html import unescape
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from finery.data.sample import Message
from finery.talks.options import TalkOptions
from finery.talks.talk import Talk
from finery.web.bubbles import as_text, bubbles, fenced
from finery.web.fields import limits
from finery.web.texts import LANGUAGES, preferred, texts

DRAWS = MarkdownIt("commonmark", {"html": True}).enable("table")
"""Draws tags, as the page does."""


def drawn(text: str) -> list[Any]:
    """Tags and pictures that a page would draw."""
    tokens = DRAWS.parse(as_text(text))
    every = [*tokens, *(child for token in tokens for child in token.children or ())]
    return [token for token in every if token.type in ("html_block", "html_inline", "image")]


PIECES = st.lists(
    st.sampled_from(
        [
            "<b>",
            "</b>",
            "<img src=x>",
            "<!--",
            "-->",
            "`",
            "``",
            "```",
            "~~~",
            "\n",
            "\n\n",
            "    ",
            " ",
            "a",
            "&lt;",
            "<",
            "![x](y)",
            "- ",
            "> ",
            "\\",
        ]
    ),
    max_size=14,
).map("".join)


@given(PIECES)
@settings(deadline=None)  # a busy machine may let any of them wait
def test_no_tag_is_drawn(text: str) -> None:
    """Whatever surrounds it: code that is none, fences that do not close, lists and quotes."""
    assert not drawn(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a < b & c", "a < b & c"),
        ("<b>x</b>", "&lt;b>x&lt;/b>"),
        ("&lt;", "&amp;lt;"),
        ("`<b>` <b>", "`<b>` &lt;b>"),
        ("``a ` <b>`` <i>", "``a ` <b>`` &lt;i>"),
        ("```\n<b>\n```\n<b>", "```\n<b>\n```\n&lt;b>"),
        ("x\n\n    <b>", "x\n\n    <b>"),
        ("", ""),
    ],
)
def test_code_stays_what_it_is(text: str, shown: str) -> None:
    assert as_text(text) == shown


@given(st.text(alphabet="<>&;!ab `#\n", max_size=30))
@settings(deadline=None)  # a busy machine may let any of them wait
def test_nothing_is_lost(text: str) -> None:
    assert unescape(unescape(as_text(text))) == unescape(unescape(text))


def test_no_call_ends_its_block() -> None:
    text = fenced('[{"name": "x", "arguments": {"a": "```` <b>"}}]')
    (token,) = DRAWS.parse(text)
    assert token.type == "fence" and token.info == "json"


def test_a_whole_talk() -> None:
    call = Message("function", '[{"name": "weather", "arguments": {}}]', "I <b> look.\n\n", "Let me see.")
    talk = Talk(messages=[Message("user", "Hi <i>"), call, Message("observation", "18"), Message("assistant", "So.")])
    user, calling, result, answer = bubbles(talk, None, "en", True)
    assert user == {"role": "user", "content": "Hi &lt;i>"}
    assert calling["content"].startswith(
        "<details><summary>Thought</summary><div>I &lt;b&gt; look.</div></details>\n\nLet me see.\n\n```json"
    )
    assert result == {"role": "user", "content": "**Result:**\n\n18"}
    assert answer == {"role": "assistant", "content": "So."}
    assert bubbles(talk, None, "en", False)[0]["content"] == "Hi <i>"


@pytest.mark.parametrize("language", [code for code in LANGUAGES if code != "en"])
def test_settings_are_told_in_every_language(language: str) -> None:
    """In English it is the options that tell."""
    told = texts(language).told["settings"]
    assert told.keys() == TalkOptions.model_fields.keys()
    assert all(value.keys() == {"label", "info"} for value in told.values())


@pytest.mark.parametrize(
    ("accepted", "code"), [("", "en"), ("fr, de;q=0.5", "en"), ("fr, zh-CN;q=0.9, en", "zh"), ("RU-ru", "ru"), ("ko,en", "ko")]
)
def test_the_language_of_a_browser(accepted: str, code: str) -> None:
    assert preferred(accepted) == code


def test_ranges_are_the_options_own() -> None:
    found = {name: limits(TalkOptions, name) for name in TalkOptions.model_fields}
    assert found["top_p"] == (0, 1) and found["presence_penalty"] == (-2, 2)
    assert found["max_new_tokens"] == (0, None) and found["do_sample"] == (None, None)
