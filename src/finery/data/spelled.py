"""Special tokens that the text of data spells: they are read as text, and steer nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from finery.data.sample import Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0"
"""Stands within a word that spells a special token and is not one; a code point that no text means."""
TEXTS = ("content", "thought", "before_calls")
"""The texts of a message."""
_ANSWERS = ("assistant", "function")


def without_marks(said: str) -> str:
    """A message about marked texts, for people."""
    return said.replace(MARK, "").replace(repr(MARK)[1:-1], "")


class Words:
    """Words to be marked in texts."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = sorted((word for word in set(words) if len(word) > 1), key=len, reverse=True)
        self._firsts = tuple({word[0] for word in self._words})  # looking for these first costs next to nothing

    def __contains__(self, word: str) -> bool:
        return word in self._words

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Any of the words, the longest first."""
        return re.compile("|".join(map(re.escape, self._words)) or r"(?!)")

    @cached_property
    def _marked(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(word[0] + MARK + word[1:]) for word in self._words) or r"(?!)")

    def mark(self, text: str) -> str:
        """A text whose words are marked."""
        for first in self._firsts:
            if first in text:
                break
        else:
            return text
        return self.pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)

    def marked_in(self, text: str) -> list[str]:
        """The words that are marked in a text."""
        return [found.replace(MARK, "", 1) for found in self._marked.findall(text)] if MARK in text else []

    def unmark(self, text: str) -> str:
        """The text as it was."""
        return self._marked.sub(lambda found: found[0][0] + found[0][2:], text) if MARK in text else text


class Spelled:
    """Marks what the data spell: in questions and what tools say every special token, in answers those that end or open a turn.

    What a model writes within an answer (the marks of thoughts, calls, code) is its own.
    """

    def __init__(self, special: Iterable[str], structure: Collection[str]) -> None:
        """`structure` ends or opens turns; some vocabularies do not call it special."""
        self.every = Words([*special, *structure])
        self.structure = Words(structure)

    def mark(self, sample: Sample) -> Sample:
        """The sample with its texts marked; the same object where there is nothing to mark."""
        system, tools = self.every.mark(sample.system), self.every.mark(sample.tools)
        messages = tuple(map(self._message, sample.messages))
        same = system == sample.system and tools == sample.tools and all(map(_is, messages, sample.messages))
        return sample if same else replace(sample, messages=messages, system=system, tools=tools)

    def _message(self, message: Message) -> Message:
        words = self.structure if message.role in _ANSWERS else self.every
        if not message.thought and not message.before_calls:
            content = words.mark(message.content)
            return message if content == message.content else replace(message, content=content)
        texts = {name: words.mark(text) for name in TEXTS if (text := getattr(message, name))}
        changed = {name: text for name, text in texts.items() if MARK in text and text != getattr(message, name)}
        return replace(message, **changed) if changed else message

    def unmark(self, text: str) -> str:
        """The text as the data have it."""
        return self.every.unmark(text)


def _is(one: object, other: object) -> bool:
    return one is other


def special_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that a vocabulary calls special; none where a tokenizer of the old kind could not tell them from text."""
    tokens: Any = tokenizer.added_tokens_decoder.values() if tokenizer.is_fast else ()
    return [token.content for token in tokens if token.special]


class SplitTokenizer:
    """Encodes texts in which some of `words`, tokens all, are marked: these are text, the others tokens.

    It is a twin of the tokenizer that knows those tokens by other names, too; the vocabulary is held once.
    """

    def __init__(self, backend: Any, tokenizer: PreTrainedTokenizerBase, words: Words) -> None:
        from tokenizers import Tokenizer

        self._words = words
        self._backend = Tokenizer(backend.model)
        for part in ("normalizer", "pre_tokenizer"):
            if (found := getattr(backend, part)) is not None:
                setattr(self._backend, part, found)
        self._names: dict[str, str] = {}
        self._ids: dict[int | None, int] = {}
        known = tokenizer.added_tokens_decoder
        for id, token in known.items():
            self._add(token.content, id, token, {"normalized": token.normalized, "special": token.content in words})
        for number, (id, token) in enumerate(known.items()):  # after all others: each of those keeps the number it has, if it can
            if token.content in words:
                self._names[token.content] = f"\ufdd1{number}\ufdd2"
                self._add(self._names[token.content], id, token, {"normalized": False, "special": False})
        self._backend.encode_special_tokens = True  # what is special is read as text

    def _add(self, name: str, id: int, like: Any, kind: dict[str, bool]) -> None:
        from tokenizers import AddedToken

        token = AddedToken(name, single_word=like.single_word, lstrip=like.lstrip, rstrip=like.rstrip, **kind)
        (self._backend.add_special_tokens if kind["special"] else self._backend.add_tokens)([token])
        self._ids[self._backend.token_to_id(name)] = id

    def encode(self, text: str) -> list[int]:
        """Token ids of a marked text."""
        named = self._words.pattern.sub(lambda found: self._names[found[0]], text)
        ids = self._backend.encode(self._words.unmark(named), add_special_tokens=False).ids
        return [self._ids.get(id, id) for id in ids]
