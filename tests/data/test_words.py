"""Known words give the ids that the tokenizer itself gives, whatever the text, and step back where they cannot be sure."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from finery.data import words as words_module
from finery.data.registry import PACKAGED
from finery.data.tokenise import Tokeniser
from finery.data.words import KnownWords, known_words

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def _split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), _bytes(use_regex=False)])


FOLLOWED: dict[str, Callable[[], Any]] = {
    "gpt-2": _bytes,
    "digits": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes()]),
    "llama-3": lambda: _split(_LLAMA3),
    "qwen-3.5": lambda: _split(_QWEN35),
    "o200k": lambda: _split(_O200K),
}


def _built(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """A byte-level vocabulary that has learnt some merges from the packaged rows, which are in two languages."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train([str(path) for path in sorted(PACKAGED.glob("*.json"))], trainer)
    return backend


def _plain(backend: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@pytest.fixture(scope="module")
def followed() -> dict[str, tuple[KnownWords, Callable[[list[str]], list[list[int]]]]]:
    built = {name: _built(make(), normalizers.NFC() if name == "llama-3" else None) for name, make in FOLLOWED.items()}
    made = {name: (known_words(backend, _plain(backend)), _plain(backend)) for name, backend in built.items()}
    assert all(words is not None for words, _ in made.values())
    return made  # type: ignore[return-value]


_WRITTEN = st.text(st.sampled_from(words_module._ALPHABET), max_size=60)
_ODD = st.text(max_size=12)  # any character: marks that combine, digits of other scripts, spaces of all kinds, control characters
_TRICKY = st.sampled_from(
    [
        *(" ", "  ", "\n", "\r\n \n", "'s", "'LL", "\u212a", "\u017f", "\u00b2", "\u00bd", "\x1c", "\x85", "\u00a0", "\u00e9", "e\u0301"),
        *("\u0301", "\u4e09\u6708", "\uff11", "\U0001f600", "\u200d", "\ufeff"),
    ]
)
"""Letters that fold to s and k, numbers that are no digits, spaces that not every library calls so, marks that combine."""


@given(pieces=st.lists(st.one_of(_WRITTEN, _ODD, _TRICKY), max_size=8), name=st.sampled_from(sorted(FOLLOWED)))
@settings(max_examples=600, deadline=None)
def test_any_text_has_the_tokenizers_own_ids(followed: Any, pieces: list[str], name: str) -> None:
    """Cold and warm, and the pieces apart beside the whole, so that words of one text are known in the next."""
    words, plain = followed[name]
    texts = ["".join(pieces), *pieces]
    assert words.encode(texts) == plain(texts) == words.encode(texts)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "qwen35", "command-r"])
def test_real_vocabularies(shared: Path, name: str) -> None:
    backend = Tokenizer.from_file(str(shared / "vendor" / "tokenizers" / name / "tokenizer.json"))
    words, plain = known_words(backend, _plain(backend)), _plain(backend)
    assert words is not None
    for path in [*(shared / "data").glob("*demo*.json"), Path(words_module.__file__), *(shared / "reference").glob("*.md")]:
        text = path.read_text(encoding="utf-8").replace("<|", "<")[:200_000]
        texts = [text[start : start + 499] for start in range(0, len(text), 499)]
        assert words.encode(texts) == plain(texts), path


OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "a space before the text": lambda: _built(_bytes(add_prefix_space=True)),
    "digits that stay together": lambda: _built(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), _bytes()])),
    "words joined to signs": lambda: _built(_split(_LLAMA3, "merged_with_next")),
    "what lies between": lambda: _built(_split(_LLAMA3, invert=True)),
    "a look back": lambda: _built(_split(r"(?<=a)b|\p{L}+|[^\p{L}]")),
    "kinds that are none of ours": lambda: _built(_split(r"\p{Han}+|\P{L}+|\p{L}+")),
    "a script": lambda: _built(_split(r"[\p{Latin}]+|[^\p{Latin}]")),
    "sets in sets": lambda: _built(_split(r"[[:alpha:]]+|[^a-z]")),
    "groups": lambda: _built(_split(r"(\p{L})+|[^\p{L}]")),
    "what one library alone understands": lambda: _built(_split(r"\p{L}+|\h+|[^\p{L}]")),
    "words that are left out of the pattern": lambda: _built(_split(r"\p{L}+")),
    "compatible forms": lambda: _built(_bytes(), normalizers.NFKC()),
    "small letters": lambda: _built(_bytes(), normalizers.Lowercase()),
    "pieces by a sign": lambda: _built(pre_tokenizers.Metaspace()),
    "several cuts": lambda: _built(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True), _bytes()])),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_vocabularies_are_tokenised_whole(kind: str) -> None:
    """Either it is not followed, or its texts are the tokenizer's own."""
    backend = OTHERS[kind]()
    words, texts = known_words(backend, _plain(backend)), ["A bad cab ate 12 apples...  twice!", "b ab\tab"]
    if kind == "words that are left out of the pattern":
        assert words is None or words.encode(texts) == _plain(backend)(texts)
    else:
        assert words is None


def test_dropout_is_not_followed() -> None:
    backend = _built(_bytes())
    backend.model.dropout = 0.1  # type: ignore[attr-defined]
    assert known_words(backend, _plain(backend)) is None


def test_a_word_is_tokenised_once_and_all_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _built(_bytes())
    asked: list[str] = []

    def plain(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return _plain(backend)(texts)

    words = known_words(backend, plain)
    assert words is not None
    asked.clear()
    words.encode(["Yesterday Albert saw Málaga", " saw Albert"])
    words.encode(["Yesterday saw Albert"])
    assert sorted(asked) == [" Albert", " Málaga", " saw", "Yesterday"]
    asked.clear()
    long, chinese = "x" * (words_module._LONGEST + 1), "三月 Albert"
    words.encode([f"Yesterday {long}", chinese])
    words.encode([f"Yesterday {long}", chinese])
    assert sorted(asked) == [f"Yesterday {long}"] * 2 + [chinese] * 2
    monkeypatch.setattr(words_module, "_MOST_WORDS", 10)
    texts = [f"Number{letter} of{letter} many{letter}" for letter in "abcdefgh"]
    for _ in range(2):
        assert words.encode(texts) == _plain(backend)(texts)
        assert len(words._known) <= 10


def test_threads_share_the_words() -> None:
    backend = _built(_bytes())
    words, texts = known_words(backend, _plain(backend)), [f"Say {number} words, {chr(97 + number % 26)}{number}!" for number in range(300)]
    assert words is not None
    expected, wrong = _plain(backend)(texts), []

    def work(start: int) -> None:
        for place in range(300):
            at = (start + place) % 300
            if words.encode([texts[at]]) != [expected[at]]:
                wrong.append(texts[at])

    threads = [threading.Thread(target=work, args=(70 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("added", "follows"),
    [
        (AddedToken("<|end|>", special=True, normalized=False), True),
        (AddedToken("<|end|>", special=True, normalized=True), True),  # there is nothing that normalizes
        (AddedToken("New York", special=False, normalized=False), False),
        (AddedToken("<|end|>", special=True, lstrip=True), False),
        (AddedToken("end", special=False, single_word=True), False),
    ],
)
def test_tokens_that_may_lie_within_a_piece(added: AddedToken, follows: bool) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_built(_bytes()), eos_token="<|eos|>")
    tokenizer.add_tokens([added])
    tokenise = Tokeniser(tokenizer)
    assert (tokenise._known is not None) == follows
    texts = [f"In{space}New York{space}<|end|> the end<|eos|> of\nit" for space in ("", " ", "  ", "\n")] * 10
    for _ in range(3):  # at first both ways are compared, later not
        assert tokenise.ids(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert (tokenise._known is not None) == follows
