"""A tokenizer told in GGUF's words: tokens, how they are merged, how text is split before, and which of them begin and end something."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.errors import UserError
from finery.files import read_yaml
from finery.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""What a file says of each token."""
SPACE = "\u2581"
STOPS = "finery.stop_token_ids"
"""Every token that ends an answer, where there are more than the format has names for."""


@cache
def splittings() -> Mapping[str, Mapping[str, Any]]:
    """See `gguf_splitting.yaml`."""
    return read_yaml(Path(__file__).with_name("gguf_splitting.yaml"))


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of a tokenizer for `num_rows` rows of embeddings; raises `UserError` for one that the format does not know."""

    tokenizer: Any  # of transformers, with the chat template that was really used
    num_rows: int
    stop_ids: frozenset[int]

    @cached_property
    def _plan(self) -> Mapping[str, Any]:
        """The tokenizer.json."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("'export_format: gguf' reads a tokenizer.json, and this tokenizer is written in Python")
        return json.loads(backend.to_str())

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether letters of its tokens stand for bytes; else spaces are \u2581 and there are tokens for bytes, as SentencePiece has it."""
        model, parts = self._plan["model"], _steps(self._plan["pre_tokenizer"])
        if model["type"] == "BPE" and any("ByteLevel" in step for step in parts):
            return True
        if model["type"] == "BPE" and model.get("byte_fallback"):
            return False
        raise UserError(f"'export_format: gguf' knows BPE of bytes and of SentencePiece, and not this tokenizer ({model['type']})")

    def facts(self) -> Iterator[tuple[str, Any]]:
        """Keys after `tokenizer.`, and what they hold."""
        yield "ggml.model", "gpt2" if self.is_byte_level else "llama"
        yield "ggml.pre", self.pre
        yield "ggml.tokens", self._names
        yield "ggml.token_type", self._types
        if self.is_byte_level:
            yield "ggml.merges", [" ".join(pair) for pair in self._merges]
        else:
            yield "ggml.scores", self._scores
            yield "ggml.add_space_prefix", self._adds_space
        yield from self._ends()
        if isinstance(self.tokenizer.chat_template, str):
            yield "chat_template", self.tokenizer.chat_template
        self._say_what_is_lost()

    @cached_property
    def pre(self) -> str:
        """The name of how text is split."""
        if not self.is_byte_level:
            return "default"
        steps, whole = _steps(self._plan["pre_tokenizer"]), bool(self._plan["model"].get("ignore_merges"))
        for name, known in splittings().items():
            if steps == list(known["steps"]) and whole == known.get("whole_words", False):
                return name
        log.warning("GGUF has no name for how this tokenizer splits text: programs that read the file will split some texts otherwise")
        return "default"

    @cached_property
    def _merges(self) -> Sequence[Sequence[str]]:
        return [pair.split(" ") if isinstance(pair, str) else pair for pair in self._plan["model"]["merges"]]

    @cached_property
    def _ids(self) -> Mapping[str, int]:
        return {**self._plan["model"]["vocab"], **{token["content"]: token["id"] for token in self._plan["added_tokens"]}}

    @cached_property
    def _kinds(self) -> Sequence[int]:
        """One for every row."""
        kinds = [UNUSED] * self.num_rows
        for name, place in self._ids.items():
            is_byte = not self.is_byte_level and len(name) == 6 and name.startswith("<0x") and name.endswith(">")
            kinds[place] = BYTE if is_byte else NORMAL
        for token in self._plan["added_tokens"]:
            kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        if not self.is_byte_level and (unknown := self._plan["model"].get("unk_token")) in self._ids:
            kinds[self._ids[unknown]] = UNKNOWN
        return kinds

    @property
    def _types(self) -> list[int]:
        if max(self._ids.values()) >= self.num_rows:
            raise UserError(f"the tokenizer has {max(self._ids.values()) + 1} tokens, and the model rows for {self.num_rows}")
        return list(self._kinds)

    @property
    def _names(self) -> list[str]:
        """One for every row; a row without a token has a name that no text holds."""
        names = [f"[PAD{place}]" for place in range(self.num_rows)]
        for name, place in self._ids.items():
            if place < self.num_rows:
                plain = not self.is_byte_level and self._kinds[place] == USER_DEFINED
                names[place] = name.replace(SPACE, " ") if plain else name
        return names

    @property
    def _scores(self) -> list[float]:
        """SentencePiece merges what makes the token with the best score: the sooner a merge stands in the list, the better."""
        scores = [0.0] * self.num_rows
        ranks: dict[str, int] = {}
        last, num_torn = "", 0
        for left, right in self._merges:
            whole = left + right
            num_torn += whole in ranks and whole != last
            ranks.setdefault(whole, len(ranks))
            last = whole
        if num_torn:
            log.info("%d of %d merges stand apart from others of the same token and have no place", num_torn, len(self._merges))
        for name, place in self._ids.items():
            if self._kinds[place] in (NORMAL, USER_DEFINED, UNUSED):
                scores[place] = -float(ranks.get(name, len(ranks) + place))
        return scores

    @property
    def _adds_space(self) -> bool:
        """Whether a space is put before text, and before text after a special token."""
        parts = [*_listed(self._plan["normalizer"], "normalizers"), *_listed(self._plan["pre_tokenizer"], "pretokenizers")]
        if any(part["type"] == "Prepend" for part in parts):
            return True
        scheme = next((part["prepend_scheme"] for part in parts if part["type"] == "Metaspace"), "never")
        if scheme != "first":
            return scheme == "always"
        # told for all places or none: conversations are right if they begin with a special token, plain texts if they don't
        if self._turn is None:
            return True
        first = self.tokenizer(self._turn[0], add_special_tokens=False)["input_ids"][0]
        return first not in self.tokenizer.all_special_ids

    @cached_property
    def _turn(self) -> tuple[str, str] | None:
        """A conversation up to an answer, and what follows one; nothing where there is no template that can tell."""
        from jinja2 import TemplateError

        question, answer = {"role": "user", "content": "@question@"}, {"role": "assistant", "content": "@answer@"}
        try:
            text = str(self.tokenizer.apply_chat_template([question, answer], tokenize=False))
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError):  # a template's own code
            return None
        before, _, after = text.rpartition("@answer@")
        return before, after

    @property
    def _main_stop(self) -> int | None:
        """The token that ends an answer as the template writes it."""
        after = self._turn[1] if self._turn else ""
        names = {place: self.tokenizer.decode([place]) for place in self.stop_ids}
        if written := [place for place, name in names.items() if name and name in after]:
            return min(written, key=lambda place: after.index(names[place]))
        own = self.tokenizer.eos_token_id
        return own if own in self.stop_ids or not self.stop_ids else min(self.stop_ids)

    def _ends(self) -> Iterator[tuple[str, Any]]:
        """Tokens that begin and end something. Answers end at three at most by the format: eos, eot and eom."""
        tokenizer, main = self.tokenizer, self._main_stop
        more = sorted(self.stop_ids - {main})
        named = {"bos": tokenizer.bos_token_id, "eos": main, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
        for name, place in {**named, **dict(zip(("eot", "eom"), more, strict=False))}.items():
            if place is not None:
                yield f"ggml.{name}_token_id", place
        if len(more) > 2:
            yield STOPS, sorted(self.stop_ids)
            others = ", ".join(tokenizer.decode([place]) for place in more[2:])
            log.warning("GGUF has names for three stop tokens: programs that read the file alone won't stop at %s", others)
        plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        yield "ggml.add_bos_token", whole[0] == tokenizer.bos_token_id != plain[0]
        yield "ggml.add_eos_token", whole[-1] == tokenizer.eos_token_id != plain[-1]

    @property
    def strips(self) -> Sequence[str]:
        """Tokens that take the spaces around them, of which the format knows nothing."""
        return [token["content"] for token in self._plan["added_tokens"] if token["lstrip"] or token["rstrip"]]

    def _say_what_is_lost(self) -> None:
        alone = [token["content"] for token in self._plan["added_tokens"] if token["single_word"]]
        if alone:
            log.warning("GGUF has no words for tokens that must stand alone (%s)", ", ".join(alone))


def with_template(tokenizer: PreTrainedTokenizerBase, jinja: str | None) -> PreTrainedTokenizerBase:
    """The same with the chat template that was really used."""
    found = copy.copy(tokenizer)
    found.chat_template = jinja
    return found


def _listed(part: Mapping[str, Any] | None, inner: str) -> Sequence[Mapping[str, Any]]:
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """As `gguf_splitting.yaml` tells them."""
    found: list[dict[str, Any]] = []
    for part in _listed(pre_tokenizer, "pretokenizers"):
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            found.append({"Split": part["pattern"].get("Regex")})
        elif part["type"] == "Digits":
            found.append({"Digits": part["individual_digits"]})
        elif part["type"] == "ByteLevel":
            found.append({"ByteLevel": part["use_regex"] if not part["add_prefix_space"] else "after a space"})
        else:
            found.append({part["type"]: part})
    return found
