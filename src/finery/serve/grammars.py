"""Answers that must have a form: JSON of a schema, or calls of tools as the template's dialect writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from finery.compat import need
from finery.data.dialects.base import Call, Dialect, dump
from finery.data.sample import BadRecord
from finery.serve.refusals import bad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps does, so that an answer ends
_SPACE = "/[ \\n]{0,4}/ "  # after a thought
_LONGEST_SCHEMA = 65_536
_PROBE = Call("probe_name", {"probe_key": "probe_value"})


@dataclass(frozen=True)
class Start:
    """Where in an answer its form begins."""

    after: str = ""  # once this has been written; empty: at once
    thought: tuple[int, str] | None = None  # or after a thought, which may be opened by a token and is closed by a text


class Form:
    """A `Constraint` by a grammar, from the first token or from where a text has come; `failure` says where it could not go on."""

    def __init__(self, matcher: Any, tokens: Any, start: Start) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._after = start.after.encode()
        self._thought = start.thought
        self._seen = b""
        self.failure = ""

    def allowed(self) -> NDArray[np.int64] | None:
        """As for Constraint."""
        import numpy as np

        if self._after:
            return None
        if self._matcher.is_error():
            self.failure = str(self._matcher.get_error()).partition("\n")[0]
            return np.array(self._tokens.eos_tokens, dtype=np.int64)
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        if self._thought is not None:
            opening, _ = self._thought
            self._thought = None if opening in found else self._thought  # it is the form's own
            found = np.append(found, opening) if self._thought else found
        return found if len(found) else np.array(self._tokens.eos_tokens, dtype=np.int64)

    def take(self, token: int) -> None:
        """As for Constraint."""
        thought, self._thought = self._thought, None
        if thought is not None and token == thought[0]:
            self._after = thought[1].encode()
            return
        if not self._after:
            self._matcher.consume_token(token)
            return
        self._seen = (self._seen + self._tokens.decode_bytes([token]))[-4096:]
        _, found, rest = self._seen.partition(self._after)
        if found:
            self._after = b""
            if rest:
                self._matcher.consume_tokens(self._tokens.tokenize_bytes(rest))


@dataclass(frozen=True)
class Written:
    """How a dialect whose arguments are JSON writes a call; `joint` stands between two, where they just follow each other."""

    before: str
    middle: str
    after: str
    joint: str | None

    @property
    def mark(self) -> str:
        """The text that only a call has."""
        return self.before.partition("{")[0].strip()


def written_of(dialect: Dialect) -> Written | None:
    """Nothing where arguments are no JSON."""
    one, arguments = dialect.write([_PROBE]), dump(_PROBE.arguments)
    before, named, rest = one.partition(_PROBE.name)
    middle, found, after = rest.partition(arguments)
    if not named or not found or _PROBE.name in rest:
        return None
    try:
        two = dialect.write([_PROBE, _PROBE])
    except BadRecord:
        two = ""
    follows = two.startswith(one) and two.endswith(one) and len(two) >= 2 * len(one)
    return Written(before, middle, after, two[len(one) : len(two) - len(one)] if follows else None)


class Grammars:
    """Makes forms for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = sorted(stop_ids)

    @cached_property
    def tokens(self) -> Any:
        """The vocabulary as the grammar library has it; made when it is first needed, which takes a second."""
        need("llguidance", "it holds answers to a form")
        if not self.tokenizer.is_fast:
            raise bad("This model's tokenizer is of the old kind, which cannot be held to a form.", "response_format")
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self.tokenizer, eos_token=self.stop_ids)  # type: ignore[arg-type]

    def schema(self, schema: dict[str, Any], param: str, start: Start) -> Callable[[], Form]:
        """JSON of a schema."""
        space = _SPACE if start != Start() else ""
        return self._form(f"start: {space}answer\nanswer: {self._json(schema, param)}\n", param, start)

    def calls(self, functions: Sequence[tuple[str, dict[str, Any]]], how: Written, several: bool, start: Start) -> Callable[[], Form]:
        """Calls of some functions, with arguments of their schemas; they may start after the dialect's mark, which is not written again."""
        before = how.before.lstrip()
        is_mark = bool(start.after) and start.after == how.mark
        first = before.removeprefix(how.mark) if is_mark else before
        space = _SPACE if start != Start() and not is_mark else ""
        more = f" ({self._text(how.joint + how.before)} call)*" if several and how.joint is not None else ""
        rules = [f"start: {space}{self._text(first)} call{more}", f"call: {' | '.join(f'call{at}' for at in range(len(functions)))}"]
        for at, (name, schema) in enumerate(functions):
            param = f"tools[{at}].function.parameters"
            rules.append(f"call{at}: {self._text(name + how.middle)} arguments{at} {self._text(how.after)}")
            rules.append(f"arguments{at}: {self._json(schema, param)}")
        return self._form("\n".join(rules) + "\n", "tools", start)

    def _json(self, schema: dict[str, Any], param: str) -> str:
        text = json.dumps(schema | {"x-guidance": _WRITTEN})
        if len(text) > _LONGEST_SCHEMA:
            raise bad(f"A schema may have {_LONGEST_SCHEMA:,} characters.", param)
        self._check(f"start: %json {text}\n", param)
        return f"%json {text}"

    def _text(self, text: str) -> str:
        """A text as the grammar has it, in which special tokens are tokens."""
        parts, at = [], 0
        while at < len(text):
            begin, end, id = self._next_special(text, at)
            parts += [json.dumps(text[at:begin], ensure_ascii=False)] if begin > at else []
            parts += [f"<[{id}]>"] if id is not None else []
            at = end
        return " ".join(parts) or '""'

    def _next_special(self, text: str, at: int) -> tuple[int, int, int | None]:
        found = [(begin, -len(word), id) for word, id in self._special.items() if (begin := text.find(word, at)) >= 0]
        begin, negative, id = min(found, default=(len(text), 0, None))
        return begin, begin - negative, id

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return {token.content: id for id, token in added if self.tokens.is_special_token(id)}

    def _check(self, lark: str, param: str) -> None:
        from llguidance import LLMatcher

        fault = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(lark), self.tokens, limits=self._limits)
        if fault:
            raise bad(f"The schema cannot be held to: {fault.splitlines()[0][:300]}", param, "invalid_json_schema")

    @cached_property
    def _limits(self) -> Any:
        from llguidance import LLParserLimits

        return LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)

    def _form(self, lark: str, param: str, start: Start) -> Callable[[], Form]:
        from llguidance import LLMatcher

        self._check(lark, param)
        grammar = LLMatcher.grammar_from_lark(lark)
        matcher = LLMatcher(self.tokens, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise bad(f"The schema cannot be held to: {matcher.get_error().splitlines()[0][:300]}", param, "invalid_json_schema")
        return lambda: Form(matcher.deep_copy(), self.tokens, start)
