"""Named templates: pieces of text from a data file, tokenised piece by piece in training and serving alike."""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import yaml

from finery.data.sample import BadRecord, Message, Sample
from finery.data.template import FOLDER, Template, Turn, with_thought
from finery.data.tokenise import Asking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = "{{content}}"
SPECIAL = ("bos", "eos")
"""A piece that is one of these words alone stands for the tokenizer's own token."""


@dataclass(frozen=True)
class Slots:
    """A template's data file. Each slot is a list of pieces: text with `{{content}}`, or `{bos}`, `{eos}`."""

    prefix: tuple[str, ...] = ()
    system: tuple[str, ...] = (CONTENT,)
    user: tuple[str, ...] = (CONTENT,)
    assistant: tuple[str, ...] = (CONTENT, "{eos}")
    observation: tuple[str, ...] | None = None  # a tool's answer; the user's slot where it is not given
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False  # the first stop word becomes the tokenizer's end token
    efficient_eos: bool = False  # answers are written without an end token; one closes the whole

    @classmethod
    def read(cls, name: str) -> "Slots":
        """Read templates/<name>.yaml; `like: other` inherits from another file."""
        data: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) or {}
        parent = data.pop("like", None)
        own = {key: tuple(value) if isinstance(value, list) else (value,) if key in _PIECES else value for key, value in data.items()}
        inherited = vars(cls.read(parent)) if parent else {}
        return cls(**{**inherited, **own})


_PIECES = {"prefix", "system", "user", "assistant", "observation"}


class SlotTemplate(Template):
    """Slots filled in, each piece tokenised on its own, as the reference does."""

    def __init__(self, name: str, slots: Slots, tokenizer: "PreTrainedTokenizerBase") -> None:
        super().__init__(tokenizer)
        self.name = name
        self.slots = slots
        if slots.efficient_eos and isinstance(tokenizer.eos_token_id, int):
            self.late_end = tokenizer.eos_token_id
        words = [*slots.stop_words, tokenizer.eos_token]
        self.stop_ids = frozenset(id for word in words if isinstance(id := tokenizer.convert_tokens_to_ids(word), int))

    @classmethod
    def load(cls, name: str, tokenizer: "PreTrainedTokenizerBase") -> "SlotTemplate":
        """Read the data file and give the tokenizer what the template needs: end, pad, stop words, Jinja."""
        slots = Slots.read(name)
        stop_words = list(slots.stop_words)
        if slots.replace_eos and stop_words:
            tokenizer.add_special_tokens({"eos_token": stop_words.pop(0)})
        if tokenizer.eos_token is None:
            tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if stop_words:
            tokenizer.add_special_tokens({"additional_special_tokens": stop_words}, replace_extra_special_tokens=False)
        template = cls(name, slots, tokenizer)
        tokenizer.chat_template = template.jinja
        return template

    def turns(self, sample: Sample) -> Asking[list[list[Turn]]]:
        """One conversation; the end of each answer, with what the slot writes after it, is learnt."""
        if sample.tools.strip() not in ("", "[]") or any(message.role == "function" for message in sample.messages):
            raise BadRecord(f"tools are not supported yet with template {self.name!r}; leave 'template' out to use the model's own")
        texts: list[str | int] = self._head(sample.system)
        spans, begin = [], 0  # of each turn: where its source and its target begin and end, in `texts`
        for message in sample.messages:
            middle = len(texts)
            texts += self._fill(self._slot(message), with_thought(message))
            if message.role == "assistant":
                spans.append((begin, middle, len(texts), message.train is not False))
                begin = len(texts)
        if not spans:
            raise BadRecord("there is no answer to learn")
        found = iter((yield [text for text in texts if isinstance(text, str)]))
        ids = [next(found) if isinstance(text, str) else [text] for text in texts]
        return [[Turn(_joined(ids[begin:middle]), _joined(ids[middle:end]), learn=learn) for begin, middle, end, learn in spans]]

    def prompt_ids(self, messages: list[Message], system: str = "", tools: str = "") -> list[int]:
        """The same pieces as in training, up to the place where the answer begins."""
        texts = self._head(system)
        for message in messages:
            texts += self._fill(self._slot(message), with_thought(message))
        found = iter(self.tokenise.ids([text for text in texts if isinstance(text, str)]))
        return list(chain.from_iterable(next(found) if isinstance(text, str) else [text] for text in texts))

    @property
    def jinja(self) -> str | None:
        """The slots as a Jinja template: system, user, tool and assistant messages."""
        slots = self.slots
        user, tool = (self._jinja(slot) for slot in (slots.user, slots.observation or slots.user))
        default = f"{{% else %}}{self._jinja(slots.system, _literal(slots.default_system))}" if slots.default_system else ""
        return (
            f"{self._jinja(slots.prefix)}"
            "{% if messages and messages[0]['role'] == 'system' and messages[0]['content'] %}"
            f"{self._jinja(slots.system, _expression('messages[0]' + _KEY))}{default}{{% endif %}}"
            "{% for message in messages %}"
            f"{{% if message['role'] == 'user' %}}{user}"
            f"{{% elif message['role'] == 'tool' %}}{tool}"
            f"{{% elif message['role'] == 'assistant' %}}{self._jinja(slots.assistant)}{{% endif %}}"
            "{% endfor %}"
        )

    def _slot(self, message: Message) -> tuple[str, ...]:
        if message.role == "assistant":
            return self.slots.assistant
        return (self.slots.observation or self.slots.user) if message.role == "observation" else self.slots.user

    def _head(self, system: str) -> list[str | int]:
        system = system or self.slots.default_system
        return self._fill(self.slots.prefix, "") + (self._fill(self.slots.system, system) if system else [])

    def _fill(self, slot: tuple[str, ...], content: str) -> list[str | int]:
        """A slot's pieces: text to be tokenised on its own, or the id of a special token."""
        pieces: list[str | int] = []
        for piece in slot:
            if (special := _special(piece)) is not None:
                id = getattr(self.tokenizer, f"{special}_token_id")
                pieces += [id] if id is not None else []
            else:
                pieces.append(piece.replace(CONTENT, content, 1) if CONTENT in piece else piece)
        return pieces

    def _jinja(self, slot: tuple[str, ...], content: str | None = None) -> str:
        content = _expression("message" + _KEY) if content is None else content
        texts = []
        for piece in slot:
            if (special := _special(piece)) is not None:
                texts.append(_literal(getattr(self.tokenizer, f"{special}_token") or ""))
            else:
                texts.append(content.join(_literal(text) for text in piece.split(CONTENT, 1)))
        return "".join(texts)


_KEY = "['content']"


def _joined(parts: list[list[int]]) -> list[int]:
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))


def _special(piece: str) -> str | None:
    word = piece.strip("{}")
    return word if piece == f"{{{word}}}" and word in SPECIAL else None


def _expression(code: str) -> str:
    return "{{ " + code + " }}"


def _literal(text: str) -> str:
    """Text as a Jinja expression, so that no brace or newline in it is read as code or trimmed."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return _expression(f"'{escaped}'") if text else ""
