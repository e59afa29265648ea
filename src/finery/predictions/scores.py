"""BLEU-4 and ROUGE-1/2/L of an answer against the one in the data, by the definitions that users of LLaMA-Factory compare by.

BLEU counts characters, not words, and smooths by NIST's rule (the third of Chen and Cherry, 2014). ROUGE counts words as jieba cuts them,
and is F1. Both are percentages of one pair; a set's score is the mean over its pairs.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from finery.compat import need
from finery.files import cache_folder

NAMES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
_TINY = 1e-8
_ENDS = tuple(
    re.compile(pattern) for pattern in ("([。！？?])([^”’])", r"(\.{6})([^”’])", "(…{2})([^”’])", "([。！？?][”’])([^，。！？?])")
)
"""Where a sentence ends in a text, and the character that follows."""


def scores(answer: str, label: str) -> dict[str, float]:
    """All of `NAMES`, in percent."""
    ours, theirs = words(answer), words(label)
    found = {"bleu-4": bleu(answer, label)}
    found |= {"rouge-1": rouge_n(ours, theirs, 1), "rouge-2": rouge_n(ours, theirs, 2), "rouge-l": rouge_l(ours, theirs)}
    return {name: round(100 * value, 4) for name, value in found.items()}


def bleu(answer: Sequence[str], label: Sequence[str]) -> float:
    """The geometric mean of the shares of n-grams (n = 1 … 4) that the label has as well, less where the answer is shorter.

    A share of nothing counts as half of one n-gram, the next as a quarter, and so on; without a single common symbol the score is 0.
    """
    logs, halvings = [], 0
    for size in range(1, 5):
        ours, theirs = _counted(answer, size), _counted(label, size)
        common, every = sum((ours & theirs).values()), max(sum(ours.values()), 1)
        if size == 1 and not common:
            return 0.0
        if not common:
            halvings += 1
        logs.append(math.log(common / every if common else 1 / (2**halvings * every)))
    shortness = 1.0 if len(answer) > len(label) else math.exp(1 - len(label) / len(answer))
    return shortness * math.exp(math.fsum(0.25 * log for log in logs))


def _counted(symbols: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(symbols[start:] for start in range(size)), strict=False))


def words(text: str) -> list[str]:
    """The words of a text as ROUGE counts them: cut by jieba, white space left out.

    Where a sentence ends with its line, or an empty line follows, an empty word counts, as users' figures have it.
    """
    joined = " ".join(_cutter()(text))
    if not joined.strip():
        return []
    for end in _ENDS:
        joined = end.sub(r"\1\n\2", joined)
    lines = [line for line in joined.rstrip().split("\n") if line]
    return [word for line in lines for word in " ".join(line.split()).split(" ")]


@cache
def _cutter() -> Callable[[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42.1 reads its dictionary in a way that setuptools will take away
        jieba = need("jieba", "it cuts Chinese texts into words, for ROUGE")
    jieba.setLogLevel(logging.WARNING)
    own = jieba.Tokenizer()
    own.tmp_dir = str(cache_folder())  # where its dictionary is kept ready
    return own.lcut


def rouge_n(answer: Sequence[str], label: Sequence[str], size: int) -> float:
    """F1 of the different n-grams."""
    ours, theirs = set(_counted(answer, size)), set(_counted(label, size))
    return _f1(len(ours & theirs), len(ours), len(theirs))


def rouge_l(answer: Sequence[str], label: Sequence[str]) -> float:
    """F1 of the longest sequence of words that both have in that order, others between them."""
    return _f1(lcs_length(answer, label), len(answer), len(label))


def _f1(common: int, ours: int, theirs: int) -> float:
    precision, recall = (common / ours if ours else 0.0), (common / theirs if theirs else 0.0)
    return 2 * precision * recall / (precision + recall + _TINY)


def lcs_length(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, a whole row of the table at a time as the bits of one number (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(one)) - 1
    row = every
    for word in other:
        hit = row & places.get(word, 0)
        row = ((row + hit) | (row - hit)) & every
    return len(one) - row.bit_count()
