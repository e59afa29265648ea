"""Named templates: pieces of text from a data file, tokenised piece by piece in training and serving alike."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finery.data.dialects import DIALECTS
from finery.data.dialects.base import Dialect, bare, dump, read_calls, read_tools
from finery.data.sample import BadRecord, Message, Role, Sample
from finery.data.spelled import without_marks
from finery.data.template import FOLDER, Template, TemplateOptions, Turn
from finery.data.thoughts import Thinking
from finery.data.tokenise import Asking, together
from finery.errors import UserError, suggestion
from finery.files import read_yaml
from finery.options import one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = "{{content}}"
SPECIAL = ("bos", "eos")
"""A piece that is one of these words in braces alone stands for the tokenizer's own token."""
_ANSWERS = ("assistant", "function")


@dataclass(frozen=True)
class Slots:
    """A template's data file. Each slot is a list of pieces: text with `{{content}}`, or `{bos}`, `{eos}`, `{token:word}`."""

    name: str = ""
    prefix: tuple[str, ...] = ()
    system: tuple[str, ...] = (CONTENT,)
    user: tuple[str, ...] = (CONTENT,)
    assistant: tuple[str, ...] = (CONTENT, "{eos}")
    observation: tuple[str, ...] | None = None  # a tool's answer; the user's slot where it is not given
    function: tuple[str, ...] | None = None  # an assistant's tool calls; the assistant's slot where it is not given
    default_system: str = ""
    system_in_question: bool = False  # the system text stands within the first question
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False  # the first stop word becomes the tokenizer's end token
    efficient_eos: bool = False  # answers are written without an end token; one closes the whole
    tool_format: str = "default"  # the dialect in which tools are described and called
    tools: str | None = None  # around the schemas as JSON, where the dialect does not describe them
    strip_tools: bool = False  # without a system text, the description of tools begins without empty lines
    reasoning: bool = False  # answers may be thought out first
    thought_words: tuple[str, ...] = ("<think>\n", "\n</think>\n\n")
    empty_thought: str | None = None  # where it is not both words

    def of_role(self, role: Role) -> tuple[str, ...]:
        """The slot of a message."""
        own = {"assistant": self.assistant, "function": self.function, "observation": self.observation}.get(role, self.user)
        return own if own is not None else self.assistant if role == "function" else self.user

    @classmethod
    def read(cls, name: str) -> "Slots":
        """Read templates/<name>.yaml; `like: other` inherits from another file."""
        return cls._of(read_yaml(FOLDER / f"{name}.yaml") or {}, name)

    @classmethod
    def of_file(cls, path: Path) -> "Slots":
        """Read a user's own file; raises `UserError` where it is no template."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"'template': {path} cannot be read as YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(data, dict):
            raise UserError(f"'template': {path} should hold keys such as user and assistant, found {data!r:.60}")
        _check(data, path)
        return cls._of(data, path.name)

    @classmethod
    def _of(cls, data: dict[str, Any], name: str) -> "Slots":
        parent = data.pop("like", None)
        own = {key: (value,) if key in PIECES and isinstance(value, str) else value for key, value in data.items()}
        own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
        inherited = vars(cls.read(parent)) if parent else {}
        return cls(**{**inherited, **own, "name": name})


PIECES = ("prefix", "system", "user", "assistant", "observation", "function")
_LISTS = ("stop_words", "thought_words")


def _check(data: dict[str, Any], path: Path) -> None:
    """Raise `UserError` for what is wrong in a user's file."""
    known = {field.name: field for field in fields(Slots) if field.name != "name"}
    for key, value in data.items():
        if key == "like":
            if not isinstance(value, str) or not (FOLDER / f"{value}.yaml").is_file():
                raise UserError(f"{path}: 'like' should name a template that Finery has, found {value!r}")
        elif key not in known:
            raise UserError(f"{path}: unknown key {key!r}{suggestion(key, [*known, 'like'])}")
        elif key in (*PIECES, *_LISTS):
            _check_texts(key, value, path)
        elif key == "tool_format" and value not in DIALECTS.names():
            raise UserError(f"{path}: 'tool_format' {one_of(value, DIALECTS.names())}, found {value!r}")
        elif not isinstance(value, wanted := bool if isinstance(known[key].default, bool) else str):
            raise UserError(f"{path}: {key!r} should be {'true or false' if wanted is bool else 'a text'}, found {value!r:.80}")


def _check_texts(key: str, value: Any, path: Path) -> None:
    """As `_check`, for a key that takes texts."""
    if value is None and key in ("observation", "function"):
        return
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: {key!r} should be a text or a list of texts, found {value!r:.80}")
    if key in PIECES[1:] and sum(text.count(CONTENT) for text in texts) != 1:
        raise UserError(f"{path}: {key!r} should hold {CONTENT} once, found {value!r:.80}")
    if key in _LISTS[1:] and len(texts) != 2:
        raise UserError(f"{path}: {key!r} should be two texts, found {value!r:.80}")


class SlotTemplate(Template):
    """Slots filled in, each piece tokenised on its own, as the reference does."""

    def __init__(
        self, slots: Slots, tokenizer: "PreTrainedTokenizerBase", thinking: Thinking | None = None, split: bool | None = None
    ) -> None:
        super().__init__(tokenizer, split)
        self.name = slots.name
        self.slots = slots
        self.dialect: Dialect = DIALECTS[slots.tool_format]()
        self.thought_words = slots.thought_words
        self.thinking = thinking if slots.reasoning else None
        self.drops_thoughts = self.thinking is not None and self.thinking.enabled is False
        if slots.efficient_eos and isinstance(tokenizer.eos_token_id, int):
            self.late_end = tokenizer.eos_token_id
        words = [*slots.stop_words, tokenizer.eos_token]
        self.stop_ids = frozenset(id for word in words if isinstance(id := tokenizer.convert_tokens_to_ids(word), int))
        opening = (*slots.prefix, *slots.system, *slots.user, *slots.of_role("observation"))
        self._keep_apart("".join(piece if (word := special_of(piece)) is None else token_text(tokenizer, word) for piece in opening))

    @classmethod
    def saved(cls, options: TemplateOptions, name: str, tokenizer: "PreTrainedTokenizerBase", strip_history: bool) -> "SlotTemplate | None":
        """The template that a tokenizer was saved with, if it would still write the same; the tokenizer is not changed."""
        slots = _chosen(options, Slots.read(name))
        template = cls(slots, tokenizer, Thinking.of(options, slots, strip_history), options.split_special_tokens)
        return template if template.jinja == tokenizer.chat_template else None

    @classmethod
    def load(cls, options: TemplateOptions, name: str, tokenizer: "PreTrainedTokenizerBase", strip_history: bool = False) -> "SlotTemplate":
        """Read the data file and give the tokenizer what the template needs: end, pad, stop words, Jinja."""
        slots = _chosen(options, Slots.of_file(options.own_file) if options.own_file is not None else Slots.read(name))
        fit_tokenizer(slots, tokenizer)
        template = cls(slots, tokenizer, Thinking.of(options, slots, strip_history), options.split_special_tokens)
        tokenizer.chat_template = template.jinja
        return template

    @property
    def shape(self) -> str:
        """The data file and what becomes of thoughts."""
        return repr((self.slots, self.thinking, self.split))

    @property
    def chosen_dialect(self) -> Dialect | None:
        """As for Template."""
        return self.dialect

    def turns(self, sample: Sample) -> Asking[list[list[Turn]]]:
        """One conversation; the end of each answer, with what the slot writes after it, is learnt."""
        pieces, spans = self._laid_out(self.marked(sample))
        if not spans:
            raise BadRecord("there is no answer to learn")
        ids = yield from _ids(pieces)
        return [[Turn(_joined(ids[begin:middle]), _joined(ids[middle:end]), learn=learn) for begin, middle, end, learn in spans]]

    def prompt_ids(self, messages: list[Message], system: str = "", tools: str = "", thinks: bool = False) -> list[int]:
        """The same pieces as in training, up to the place where the answer begins; raises `UserError` where they cannot be laid out."""
        sample = Sample(tuple(messages), system, tools)
        return _joined(together([_ids(self._prompt(self.marked(sample), thinks))], self.tokenise.ids)[0])

    def _prompt(self, sample: Sample, thinks: bool) -> list[str | int]:
        try:
            pieces, _ = self._laid_out(sample)
        except BadRecord as error:
            raise UserError(without_marks(str(error))) from None
        if self.thinking is not None:
            pieces += self.thinking.before_answer(thinks)
        return pieces

    def texts(self, sample: Sample, prompt: bool, thinks: bool = False) -> list[str]:
        """The text of each piece: what the saved Jinja template writes as one text."""
        pieces = self._prompt(sample, thinks) if prompt else self._laid_out(sample)[0]
        return [piece if isinstance(piece, str) else str(self.tokenizer.convert_ids_to_tokens(piece)) for piece in pieces]

    def asks_thought(self, sample: Sample, place: int) -> bool:
        """Whether the answer has a thought."""
        return self.thinking is not None and not self.thinking.of_answer(self._answer(sample.messages[place]), last=True)[1]

    def as_called(self, sample: Sample, thinks: bool = False) -> dict[str, Any]:
        """As for Template."""
        asked = {"enable_thinking": thinks} if self.thinking is not None and self.thinking.enabled is None else {}
        return {**super().as_called(sample), **asked}

    def _laid_out(self, sample: Sample) -> tuple[list[str | int], list[tuple[int, int, int, bool]]]:
        """All pieces, and for each answer where its source and its target begin and end in them, and whether it is learnt."""
        pieces, spans, begin = self._fill(self.slots.prefix, ""), [], 0
        before, within = self._opening(sample.system, sample.tools)
        pieces += before
        last = len(sample.messages) - 1  # in a prompt every answer is past
        for place, message in enumerate(sample.messages):
            if message.role not in _ANSWERS:
                content = message.content
                if within and message.role == "user":
                    content, within = within + content, ""
                pieces += self._fill(self.slots.of_role(message.role), content)
                continue
            text = self._answer(message)
            if self.thinking is not None:
                text, masked, learnt = self.thinking.of_answer(text, place == last)
                pieces += masked
                middle = len(pieces)
                pieces += learnt
            else:
                middle = len(pieces)
            pieces += self._fill(self.slots.of_role(message.role), text)
            spans.append((begin, middle, len(pieces), message.train is not False))
            begin = len(pieces)
        return pieces, spans

    def _opening(self, system: str, tools: str) -> tuple[list[str | int], str]:
        """What stands before the first turn, and what stands within the first question."""
        system, slots = system or self.slots.default_system, self.slots
        schemas = read_tools(tools)
        if not system and not schemas:
            return [], ""
        described = ""
        if schemas and slots.tools:
            described = slots.tools.replace(CONTENT, dump([bare(tool) for tool in schemas]), 1)
        elif schemas:
            described = self.dialect.describe(schemas)
        if slots.strip_tools and not system:
            described = described.lstrip("\n")
        pieces = self._fill(slots.system, system + described)
        return ([], str(pieces[0])) if slots.system_in_question else (pieces, "")

    def _answer(self, message: Message) -> str:
        """The text of an answer: its thought in the template's words, what it says, its calls."""
        opening, closing = self.slots.thought_words
        text = f"{opening}{message.thought}{closing}" if message.thought else ""
        if message.role == "assistant":
            return text + message.content
        calls = self.dialect.write(read_calls(message.content))
        said = message.before_calls
        apart = "" if not said or said.endswith(("\n", closing.strip())) else "\n"
        return f"{text}{said}{apart}{calls}"

    def _fill(self, slot: Sequence[str], content: str) -> list[str | int]:
        """A slot's pieces: text to be tokenised on its own, or the id of a special token."""
        pieces: list[str | int] = []
        for piece in slot:
            if (special := special_of(piece)) is not None:
                id = _id_of(self.tokenizer, special)
                pieces += [id] if id is not None else []
            else:
                pieces.append(piece.replace(CONTENT, content, 1) if CONTENT in piece else piece)
        return pieces

    @property
    def jinja(self) -> str | None:
        """The slots as a Jinja template, see `slots_jinja`."""
        from finery.data.slots_jinja import written

        return written(self)


def _chosen(options: TemplateOptions, slots: Slots) -> Slots:
    """A template with what keys change in it."""
    changed = {key: value for key in ("default_system", "tool_format") if (value := getattr(options, key)) is not None}
    return replace(slots, **changed)


def fit_tokenizer(slots: Slots, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give a tokenizer the end, the pad token and the stop words of a template."""
    stop_words = list(slots.stop_words)
    if slots.replace_eos and stop_words:
        tokenizer.add_special_tokens({"eos_token": stop_words.pop(0)})
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if stop_words:
        tokenizer.add_special_tokens({"additional_special_tokens": stop_words}, replace_extra_special_tokens=False)


def special_of(piece: str) -> str | None:
    """`bos`, `eos` or `token:word`, where a piece stands for a token."""
    word = piece[1:-1] if piece.startswith("{") and piece.endswith("}") else ""
    return word if word in SPECIAL or word.startswith("token:") else None


def token_text(tokenizer: "PreTrainedTokenizerBase", special: str) -> str:
    """The text of a special piece; empty where the tokenizer has no such token."""
    return special.removeprefix("token:") if special.startswith("token:") else getattr(tokenizer, f"{special}_token") or ""


def _id_of(tokenizer: "PreTrainedTokenizerBase", special: str) -> int | None:
    if special in SPECIAL:
        return getattr(tokenizer, f"{special}_token_id")
    word = special.removeprefix("token:")
    id = tokenizer.convert_tokens_to_ids(word)
    if not isinstance(id, int) or tokenizer.convert_ids_to_tokens(id) != word:
        raise UserError(f"'template' needs the token {word!r}, which the model's vocabulary does not have; choose the model's own template")
    return id


def _ids(pieces: Sequence[str | int]) -> Asking[list[list[int]]]:
    """The ids of each piece."""
    found = iter((yield [piece for piece in pieces if isinstance(piece, str)]))
    return [next(found) if isinstance(piece, str) else [piece] for piece in pieces]


def _joined(parts: list[list[int]]) -> list[int]:
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))
