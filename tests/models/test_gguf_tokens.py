"""Tokenizers told in GGUF's words: the same tokens for the same conversations, by transformers' reader and by llama.cpp's rule."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import CHATML, build_tokenizer
from finery.errors import UserError
from finery.models.gguf_reading import Contents, mend_tokens
from finery.models.gguf_tokens import STOPS, Vocabulary

WORDS = ["the", "The", "CHAIRS", "don't", "we'll", "I'M", "12345", "3.14", "x1y22z333", "naïve", "U\u0308n\u00ef\u0301", "中文字", "<b>"]
WORDS += ["日本語", "🙂👍🏽", "C:\\dir", "_x_", "...", "!?", "¿qué?", "kommt's", "https://a.b/c?d=1"]
SPACES = [" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", ""]


def chats(number: int = 50) -> list[list[dict[str, str]]]:
    """Conversations of odd words and odd spaces, the same every time."""
    dice = random.Random(0)

    def text() -> str:
        words = [dice.choice(WORDS) + dice.choice(SPACES) for _ in range(dice.randint(3, 14))]
        return dice.choice(["", " "]) + "".join(words)

    roles = ["user", "assistant"]
    return [[{"role": roles[turn % 2], "content": text()} for turn in range(dice.choice([1, 3]))] for _ in range(number)]


PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
VENDORS = {"llama-bpe": HEADERS, "qwen2": CHATML, "gpt-2": None, "llama-spm": INST, "phi-3": PHI}
PRE = {"llama-bpe": "llama-bpe", "qwen2": "qwen2", "gpt-2": "gpt-2", "llama-spm": "default", "phi-3": "default"}


def written(tokenizer: Any, file: Path, stop_ids: frozenset[int], arch: str = "llama", name: str = "model") -> Path:
    """A file of a tokenizer alone."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, arch)
    writer.add_name(name)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in Vocabulary(tokenizer, len(tokenizer) + 3, stop_ids).facts():
        adders[type(value)](key if "finery" in key else f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return file


def read(file: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(file.parent), gguf_file=file.name)
    mend_tokens(tokenizer, Contents(file))
    return tokenizer


def vendors_own(shared: Path, vendor: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(shared / "vendor" / "tokenizers" / vendor)
    tokenizer.chat_template = VENDORS[vendor]
    return tokenizer


def rendered(tokenizer: Any) -> list[str]:
    if tokenizer.chat_template is None:
        return [chat[0]["content"] for chat in chats()]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats()]


LARGE = [pytest.param(vendor, marks=pytest.mark.slow) for vendor in ("llama-bpe", "qwen2")]  # test_gguf.py has them in small


@pytest.mark.parametrize("vendor", [*LARGE, "gpt-2", "llama-spm", "phi-3"])
def test_conversations_have_the_same_tokens(vendor: str, shared: Path, tmp_path: Path) -> None:
    ours = vendors_own(shared, vendor)
    arch, name = ("phi3", "phi-3 mini") if vendor == "phi-3" else ("llama", "model")
    file = written(ours, tmp_path / "tokens.gguf", frozenset({ours.eos_token_id}), arch, name)
    theirs = read(file)
    assert Contents(file).facts["tokenizer.ggml.pre"] == PRE[vendor]
    for text in rendered(ours):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text, add_special_tokens=False)["input_ids"], text
        assert theirs.decode(theirs(text)["input_ids"]) == ours.decode(ours(text)["input_ids"])
    assert theirs("a")["input_ids"] == ours("a")["input_ids"]  # what is put before and after
    for kind in ("bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(theirs, kind) == getattr(ours, kind)


def pieces(text: str, ids: dict[str, int], scores: Sequence[float]) -> list[int]:
    """As llama.cpp cuts what stands between special tokens: the neighbours that make the best token are joined, time and again."""
    parts = list(text.replace(" ", "\u2581"))
    while True:
        made = [(scores[ids[whole]], -place) for place in range(len(parts) - 1) if (whole := parts[place] + parts[place + 1]) in ids]
        if not made:
            break
        place = -max(made)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [each for part in parts for each in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])]


def test_scores_join_the_same_pieces(shared: Path, tmp_path: Path) -> None:
    ours = vendors_own(shared, "llama-spm")
    told = dict(Vocabulary(ours, len(ours), frozenset({2})).facts())
    assert told["ggml.add_space_prefix"] is True and "ggml.merges" not in told
    ids = {name: place for place, name in enumerate(told["ggml.tokens"])}
    for chat in chats():
        text = chat[0]["content"]
        assert pieces(" " + text, ids, told["ggml.scores"]) == ours(text, add_special_tokens=False)["input_ids"], text
    kinds = told["ggml.token_type"]
    assert kinds[:3] == [2, 3, 3] and kinds[3:259] == [6] * 256 and set(kinds[259:]) == {1}


def test_gemma_puts_no_space_before(tmp_path: Path) -> None:
    """Spaces as Gemma has them, and a token of two, which the file spells as they stand in a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import AddedToken, PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab", "\u2581\u2581"]
    merges = [("\u2581", "\u2581"), ("a", "b"), ("\u2581", "ab"), ("\u2581", "a")]
    ids = {name: place for place, name in enumerate(names)}
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    ours = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    ours.add_tokens([AddedToken("\u2581\u2581", normalized=False)])
    told = dict(Vocabulary(ours, len(ours), frozenset({1})).facts())
    assert told["ggml.add_space_prefix"] is False and told["ggml.tokens"][-1] == "  " and told["ggml.token_type"][-1] == 4
    theirs = read(written(ours, tmp_path / "tokens.gguf", frozenset({1}), "gemma2"))
    for text in ("ab ab", "a  b", "b\n é"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text, add_special_tokens=False)["input_ids"]
        assert theirs.decode(theirs(text)["input_ids"]) == text


SCHEMES = [("first", INST, False), ("first", None, True), ("always", INST, True), ("never", None, False)]


@pytest.mark.parametrize(("scheme", "template", "adds"), SCHEMES)
def test_a_space_before_the_first_word_alone(scheme: str, template: str | None, adds: bool, shared: Path) -> None:
    """The format knows all places or none: after a special token, "first" puts none."""
    from tokenizers import pre_tokenizers

    tokenizer = vendors_own(shared, "llama-spm")
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    assert dict(Vocabulary(tokenizer, len(tokenizer), frozenset({2})).facts())["ggml.add_space_prefix"] is adds


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    build_tokenizer(tmp_path / "tiny")
    return AutoTokenizer.from_pretrained(tmp_path / "tiny")


def test_the_stop_of_the_template_comes_first(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer that calls something else its end, as a base model's does."""
    tiny.eos_token = "<|endoftext|>"
    facts = dict(Vocabulary(tiny, len(tiny), frozenset({0, 2})).facts())
    assert (facts["ggml.eos_token_id"], facts["ggml.eot_token_id"], "ggml.eom_token_id" in facts, STOPS in facts) == (2, 0, False, False)
    assert facts["chat_template"] == CHATML and facts["ggml.add_bos_token"] is False
    file = written(tiny, tmp_path / "tokens.gguf", frozenset({0, 2, 5, 7}))
    assert "names for three stop tokens" in capsys.readouterr().err
    assert Contents(file).stop_ids == [0, 2, 5, 7]


def test_an_unknown_splitting_is_said(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import pre_tokenizers

    assert Vocabulary(tiny, len(tiny), frozenset({2})).pre == "gpt-2"
    tiny.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])
    assert Vocabulary(tiny, len(tiny), frozenset({2})).pre == "default"
    assert "GGUF has no name for how this tokenizer splits text" in capsys.readouterr().err


def test_other_kinds_are_refused(tiny: Any) -> None:
    from tokenizers import models

    with pytest.raises(UserError, match=r"rows for 10$"):
        dict(Vocabulary(tiny, 10, frozenset({2})).facts())
    tiny.backend_tokenizer.model = models.Unigram([("a", 0.0)], 0)
    with pytest.raises(UserError, match=r"not this tokenizer \(Unigram\)"):
        dict(Vocabulary(tiny, 700, frozenset({2})).facts())
