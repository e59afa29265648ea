"""Words whose tokens are remembered.

Most vocabularies cut a text into words by a pattern and tokenise each by itself; texts say the same words again and again.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

Encode = Callable[[list[str]], list[list[int]]]

_LETTERS = "".join(chr(code) for code in range(0xC0, 0x17F) if code not in (0xD7, 0xF7, 0x130, 0x131, 0x149))
_SIGNS = "¡¢£§©«®°±·»¿×÷–—‘’“”•…€™"
_ALPHABET = "\t\n\r" + "".join(map(chr, range(0x20, 0x7F))) + _LETTERS + _SIGNS
"""Characters whose kind is the same in every version of Unicode and of the libraries that match patterns, and that no normalization to
NFC changes, whatever their neighbours among these."""
_UNSURE = re.compile(f"[^{re.escape(_ALPHABET)}]")
_LONGEST = 64
"""Longer words are hardly met again; a text with one is tokenised whole."""
_MOST_WORDS = 50_000
"""Then all are forgotten: some 14 MB."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern of a byte-level vocabulary that names none (Radford et al. 2019, encoder.py)."""
_GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""The same between digits that stand alone."""
_NUM_PROBES = 200
_PROBES = ("'s", "'LL", "don't", " I'd", "\r\n", "\n\n ", "   ", "  x", "42", " 1", "a1", "…", " “", "é", "ÀÉ", "Zürich", "=>", "/*", "\t")


class KnownWords:
    """Tokenises word by word what is written in a well-known alphabet; other texts as the tokenizer does."""

    def __init__(self, pattern: re.Pattern[str], encode: Encode) -> None:
        """`encode` is the tokenizer's own way, without special tokens."""
        self._find = pattern.findall
        self._plain = encode
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, the same as the tokenizer's own."""
        known = self._known  # another thread may begin a new one meanwhile
        found: list[Any] = [None] * len(texts)
        unknown: list[tuple[int, list[str]]] = []
        whole: list[int] = []
        for place, text in enumerate(texts):
            if text.isascii() or not _UNSURE.search(text):
                words = self._find(text)
                try:
                    found[place] = list(chain.from_iterable(map(known.__getitem__, words)))
                except KeyError:
                    unknown.append((place, words))
            else:
                whole.append(place)
        if not unknown and not whole:
            return found
        new: dict[str, None] = {}
        sure = []
        for place, words in unknown:
            missing = [word for word in words if word not in known]
            if self._is_sure(texts[place], words, missing):
                new.update(dict.fromkeys(missing))
                sure.append((place, words))
            else:
                whole.append(place)
        ids = self._plain([*(texts[place] for place in whole), *new])
        for place, each in zip(whole, ids, strict=False):
            found[place] = each
        known.update(zip(new, ids[len(whole) :], strict=True))
        for place, words in sure:
            found[place] = list(chain.from_iterable(map(known.__getitem__, words)))
        if len(known) > _MOST_WORDS:
            self._known = {}
        return found

    def _is_sure(self, text: str, words: list[str], missing: list[str]) -> bool:
        """Whether a text is all words, and each new one is a word by itself, too."""
        if _UNSURE.search(text) or sum(map(len, words)) != len(text):
            return False
        return all(len(word) <= _LONGEST and self._find(word) == [word] for word in missing)


def known_words(backend: Any, encode: Encode) -> KnownWords | None:
    """For a byte-level vocabulary whose pattern can be followed; nothing for any other, and where a probe differs."""
    pattern = _pattern_of(backend)
    if pattern is None:
        return None
    words, dice = KnownWords(pattern, encode), random.Random(0)
    probes = []
    for _ in range(_NUM_PROBES):
        pieces = [dice.choice(_PROBES) if dice.random() < 0.5 else dice.choice(_ALPHABET) for _ in range(dice.randint(1, 16))]
        probes.append("".join(pieces))
    return words if words.encode(probes) == encode(probes) == words.encode(probes) else None


def _pattern_of(backend: Any) -> re.Pattern[str] | None:
    """What finds the words of the alphabet, as the tokenizer's own steps do."""
    normalizer, model = backend.normalizer, backend.model
    if type(model).__name__ != "BPE" or model.dropout or backend.pre_tokenizer is None:
        return None
    if normalizer is not None and _state(normalizer).get("type") != "NFC":
        return None
    state = _state(backend.pre_tokenizer)
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        if not before:
            return _followed(_GPT2)
        return _followed(_GPT2_DIGITS) if before == [{"type": "Digits", "individual_digits": True}] else None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return None
    return _followed(before[0]["pattern"].get("Regex", ""))


def _state(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__())


def _followed(pattern: str) -> re.Pattern[str] | None:
    r"""A pattern whose kinds of characters (`\p{L}`) are spelled out, as far as the alphabet goes."""
    pieces, inside = [], False
    for piece in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        if piece.startswith(("\\p{", "\\P{")):
            kind = piece[3:-1]
            if piece[1] == "P" or not re.fullmatch("[LMNPSZC][a-z]?", kind):  # such as scripts
                return None
            characters = "".join(re.escape(one) for one in _ALPHABET if unicodedata.category(one).startswith(kind))
            if not inside and not characters:
                return None
            pieces.append(characters if inside else f"[{characters}]")
            continue
        inside = piece == "[" or (inside and piece != "]")
        pieces.append(piece)
    if not pieces or re.search(r"\(\?<|\\[1-9bBAzZG]", pattern):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # told of what Python may come to read otherwise, such as sets in sets
            found = re.compile("".join(pieces))
    except (re.error, Warning):
        return None
    return None if found.groups else found  # of groups, `findall` would give the parts
