"""Named templates: pieces of text from a data file, tokenised piece by piece in training and serving alike."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from finery.data.sample import BadRecord, Message, Sample
from finery.data.template import FOLDER, Template, Turn

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
        self.name = name
        self.slots = slots
        self.tokenizer = tokenizer
        words = [*slots.stop_words, tokenizer.eos_token]
        self.stop_ids = frozenset(id for word in words if isinstance(id := tokenizer.convert_tokens_to_ids(word), int))
        self._fixed: dict[str, list[int]] = {}  # pieces without content, tokenised once

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

    def encode(self, sample: Sample) -> list[list[Turn]]:
        """One conversation; the end of each answer, with what the slot writes after it, is learnt."""
        if sample.tools.strip() not in ("", "[]") or any(message.role == "function" for message in sample.messages):
            raise BadRecord(f"tools are not supported yet with template {self.name!r}; leave 'template' out to use the model's own")
        turns, source = [], self._head(sample.system)
        for message in sample.messages:
            if message.role == "assistant":
                turns.append(Turn(source, self._fill(self.slots.assistant, message.content)))
                source = []
            else:
                source = source + self._fill(self._slot(message), message.content)
        if not turns:
            raise BadRecord("there is no answer to learn")
        return [turns]

    def prompt_ids(self, messages: list[Message], system: str = "", tools: str = "") -> list[int]:
        """The same pieces as in training, up to the place where the answer begins."""
        ids = self._head(system)
        for message in messages:
            ids += self._fill(self._slot(message), message.content)
        return ids

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

    def _head(self, system: str) -> list[int]:
        system = system or self.slots.default_system
        return self._fill(self.slots.prefix, "") + (self._fill(self.slots.system, system) if system else [])

    def _fill(self, slot: tuple[str, ...], content: str) -> list[int]:
        ids: list[int] = []
        for piece in slot:
            if (special := _special(piece)) is not None:
                id = getattr(self.tokenizer, f"{special}_token_id")
                ids += [id] if id is not None else []
            elif CONTENT in piece:
                ids += self._tokenise(piece.replace(CONTENT, content, 1))
            else:
                if piece not in self._fixed:
                    self._fixed[piece] = self._tokenise(piece)
                ids += self._fixed[piece]
        return ids

    def _tokenise(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

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


def _special(piece: str) -> str | None:
    word = piece.strip("{}")
    return word if piece == f"{{{word}}}" and word in SPECIAL else None


def _expression(code: str) -> str:
    return "{{ " + code + " }}"


def _literal(text: str) -> str:
    """Text as a Jinja expression, so that no brace or newline in it is read as code or trimmed."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return _expression(f"'{escaped}'") if text else ""
