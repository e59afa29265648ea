"""Text becomes token ids, many texts at once; what stands between special tokens is tokenised once for all texts that share it."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from finery.data.spelled import MARK, SplitTokenizer, Words, special_words
from finery.data.words import KnownWords, known_words
from finery.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

Made = TypeVar("Made")
Asking = Generator[Sequence[str], list[list[int]], Made]
"""Work that yields texts and is sent their ids, so that the texts of many samples go through the tokenizer together."""

_SHORT = 80
_MOST_KEPT = 20_000
"""Short pieces of text are remembered, such as the headers of a template."""
_NUM_PROVED = 24
"""So many texts are also tokenised in the plain way, and compared, before pieces are trusted."""


class Tokeniser:
    """Token ids without added special tokens, the same as the tokenizer's own call gives.

    Special tokens cut a text before anything else happens to it, so the pieces between them may be tokenised apart, and
    where the vocabulary is one of words, word by word. Where that is not so (a pipeline that treats the beginning of a text in
    another way), texts are tokenised whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._kept: dict[str, list[int]] = {"": []}
        self._unproved = _NUM_PROVED
        self.words = Words(special_words(tokenizer))  # those that may be marked in a text
        self._split: SplitTokenizer | None = None  # made when one is
        self._cut: re.Pattern[str] | None = None
        self._known: KnownWords | None = None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._cut = self._find_cut()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; words that are marked (see `spelled`) are text."""
        if self._backend is None:
            return [self._plain(text) for text in texts]
        if any(MARK in text for text in texts):
            plain = iter(self.ids([text for text in texts if MARK not in text]))
            return [self._split_ids(text) if MARK in text else next(plain) for text in texts]
        if self._cut is None:
            return self._encode(list(texts))
        pieces = [self._cut.split(text) for text in texts]
        missing = list(dict.fromkeys(piece for each in pieces for piece in each if piece not in self._kept))
        new = dict(zip(missing, self._encode(missing), strict=True)) if missing else {}
        found = [self._join(each, new) for each in pieces]
        if len(self._kept) < _MOST_KEPT:
            self._kept.update((piece, ids) for piece, ids in new.items() if len(piece) <= _SHORT)
        return self._prove(texts, found) if self._unproved else found

    def _join(self, pieces: list[str], new: dict[str, list[int]]) -> list[int]:
        if len(pieces) == 1:
            return list(new[pieces[0]] if pieces[0] in new else self._kept[pieces[0]])
        return list(chain.from_iterable(new[piece] if piece in new else self._kept[piece] for piece in pieces))

    def _split_ids(self, text: str) -> list[int]:
        if self._split is None:
            self._split = SplitTokenizer(self._backend, self.tokenizer, self.words)
        return self._split.encode(text)

    def one(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.ids([text])[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._known.encode(texts) if self._known is not None else self._whole(texts)

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def _prove(self, texts: Sequence[str], found: list[list[int]]) -> list[list[int]]:
        self._unproved = max(self._unproved - len(texts), 0)
        plain = [self._plain(text) for text in texts]
        if plain != found:
            log.warning("this tokenizer treats a text otherwise than its pieces: texts are tokenised whole, which takes longer")
            self._cut, self._known, self._unproved = None, None, 0
        return plain

    def _find_cut(self) -> re.Pattern[str] | None:
        """A pattern of the tokens at which a text may be cut, if the tokenizer keeps to it on a probe of each kind of neighbourhood."""
        added = [token for token in self.tokenizer.added_tokens_decoder.values() if token.content]
        normalizes = self._backend.normalizer is not None
        plain = [one.content for one in added if not ((one.normalized and normalizes) or one.single_word or one.lstrip or one.rstrip)]
        others = [token.content for token in added if token.content not in plain]
        safe = [word for word in plain if not any(word in other for other in others) and not any(c in word for c in "\n ")]
        if not safe:
            return None
        pattern = re.compile("(" + "|".join(re.escape(word) for word in sorted(safe, key=len, reverse=True)) + ")")
        word = safe[0]
        probes = [f"a{word}b", f"a {word} b", f"{word}b\n\n{word} \n c", f"{word}1 2  3{word}{word}é 好", f" a{word}  b"]
        for probe in probes:
            pieces = [piece for piece in pattern.split(probe) if piece]
            if [id for ids in self._encode(pieces) for id in ids] != self._plain(probe):
                return None
        if len(safe) == len(added):  # else some token may lie within a piece
            self._kept.update(zip(safe, self._whole(safe), strict=True))
            self._known = known_words(self._backend, self._whole)
        return pattern


def together(works: Sequence[Asking[Made]], ids: Callable[[Sequence[str]], list[list[int]]]) -> list[Made]:
    """Run works side by side: what they ask for in the same round is answered by one call of `ids`."""
    made: dict[int, Made] = {}
    answers: list[Any] = [None] * len(works)
    while len(made) < len(works):
        asked: dict[int, Sequence[str]] = {}
        for place, work in enumerate(works):
            if place not in made:
                try:
                    asked[place] = work.send(answers[place])
                except StopIteration as end:
                    made[place] = end.value
        found = iter(ids(list(chain.from_iterable(asked.values()))) if asked else ())
        for place, texts in asked.items():
            answers[place] = [next(found) for _ in texts]
    return [made[place] for place in range(len(works))]
