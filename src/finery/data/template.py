"""Templates: a conversation becomes pieces of tokens, and which of them are learnt."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from finery.data.messages import as_dicts, as_schemas
from finery.data.sample import Message, Sample
from finery.data.spelled import Spelled, special_words
from finery.data.tokenise import Asking, Tokeniser, together
from finery.errors import Complaint
from finery.options import Finding, Keys, OptionGroup, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finery.data.dialects.base import Dialect

FOLDER = Path(__file__).parent / "templates"


OWN_FILES = (".yaml", ".yml")


class TemplateOptions(OptionGroup):
    nulls = frozenset({"enable_thinking", "split_special_tokens"})

    template: str | None = None
    """The chat template: a name, the path of a .yaml file of your own, or nothing (or 'auto') for the tokenizer's own."""
    default_system: str | None = None
    """The system text of conversations that have none, instead of the template's; an empty text for none."""
    tool_format: str | None = None
    """The dialect in which a named template describes and calls tools, instead of its own."""
    enable_thinking: bool | None = True
    """Of models that think before they answer: false trains and asks for answers without thoughts; null trains answers with and without
    them as the data have them, and asks for none."""
    preserve_thinking: bool = False
    """Keep the thoughts of earlier answers where they would be taken out (with mask_history)."""

    split_special_tokens: bool | None = None
    """Whether a special token that a text spells is read as text: in conversations it is, in plain texts of pretraining it is not; true or
    false say so of both. The marks that a template writes are tokens in any case."""

    @classmethod
    def claim(cls, keys: Keys, complaints: list[Complaint]) -> Self:
        """A file of the user's own may lie beside the config."""
        entry = keys.get("template")
        if entry is not None and isinstance(entry.value, str) and entry.value.endswith(OWN_FILES):
            beside = Path(entry.source.rpartition(":")[0]).parent / entry.value
            if not Path(entry.value).is_file() and beside.is_file():
                keys["template"] = replace(entry, value=str(beside))
        return super().claim(keys, complaints)

    @property
    def own_file(self) -> Path | None:
        """The user's own file, where the template is one."""
        return Path(self.template) if self.template is not None and self.template.endswith(OWN_FILES) else None

    @property
    def name(self) -> str | None:
        """A named template, or the user's own; nothing for the tokenizer's."""
        return None if self.template == "auto" else self.template

    def check(self, run: Any) -> Iterator[Finding]:
        """Names must be known, files be there."""
        if self.own_file is not None:
            if not self.own_file.is_file():
                yield Finding("template", f"there is no file {self.own_file}")
        elif self.name is not None and self.name not in template_names():
            yield Finding(
                "template", f"{one_of(self.template, template_names())}, found {self.template!r}; leave it out to use the model's own"
            )
        if self.tool_format is not None:
            formats = import_module("finery.data.dialects").DIALECTS.names()
            if self.tool_format not in formats:
                yield Finding("tool_format", f"{one_of(self.tool_format, formats)}, found {self.tool_format!r}")
            elif self.name is None:
                yield Finding(
                    "tool_format", "belongs to named templates: the model's own 'template' writes tools in its own way", fatal=False
                )


@dataclass(frozen=True)
class Turn:
    """Token ids of one round: what is read, what is learnt, and what follows without being learnt."""

    source: list[int]
    target: list[int]
    tail: tuple[int, ...] = ()
    learn: bool = True  # unless the data say that this answer is only read
    alone: bool = False  # a row of its own, since the template rewrites history

    @property
    def size(self) -> int:
        """Tokens of all three."""
        return len(self.source) + len(self.target) + len(self.tail)


class Template(ABC):
    """Turns conversations into tokens, the same for training and for serving."""

    name: str
    stop_ids: frozenset[int]  # generation ends at any of these
    thought_words = ("<think>\n", "\n</think>\n\n")  # around a thought in an answer
    drops_thoughts = False  # thoughts in the data are not to be learnt, as a key asks
    late_end: int | None = None  # the end token, where answers are written without it and one closes the whole (`efficient_eos`)

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", split: bool | None = None) -> None:
        """`split` is the key split_special_tokens."""
        self.tokenizer = tokenizer
        self.tokenise = Tokeniser(tokenizer)
        self.split = split
        self.spelled = Spelled(special_words(tokenizer), ())

    def _keep_apart(self, header: str) -> None:
        """Words that answers may not spell as tokens: the ends of turns, and what `header`, the text before a question, has.

        The marks of thoughts are an answer's own, wherever else a template writes them.
        """
        added = self.tokenizer.added_tokens_decoder.items()
        names = {token.content: id for id, token in added if "think" not in token.content.lower()}
        structure = [name for name, id in names.items() if self.tokenizer.is_fast and (id in self.stop_ids or name in header)]
        self.spelled = Spelled(special_words(self.tokenizer), structure)
        self.tokenise.words = self.spelled.every

    def marked(self, sample: Sample) -> Sample:
        """A conversation in which special tokens that its texts spell are marked to stay text, unless told otherwise."""
        return sample if self.split is False else self.spelled.mark(sample)

    def text_ids(self, text: str) -> Asking[list[int]]:
        """A plain text for pretraining: what the tokenizer puts before a text, the text, and the end token."""
        (ids,) = yield [self.spelled.every.mark(text) if self.split else text]
        before, after = self._frame
        return [*before, *ids, *after]

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text; an end token in any case."""
        tokenizer, bare = self.tokenizer, self.tokenise.one("a")
        framed = list(tokenizer("a")["input_ids"])  # type: ignore[arg-type]
        start = next((at for at in range(len(framed)) if framed[at : at + len(bare)] == bare), 0)
        before, after = framed[:start], framed[start + len(bare) :]
        end = tokenizer.eos_token_id
        return before, after if not isinstance(end, int) or after[-1:] == [end] else [*after, end]

    def encode(self, sample: Sample) -> list[list[Turn]]:
        """The conversations to train on: one, or one per answer; raises `BadRecord`."""
        return together([self.turns(sample)], self.tokenise.ids)[0]

    @abstractmethod
    def turns(self, sample: Sample) -> Asking[list[list[Turn]]]:
        """As `encode`, for many samples side by side."""

    @abstractmethod
    def prompt_ids(self, messages: list[Message], system: str = "", tools: str = "", thinks: bool = False) -> list[int]:
        """What serving feeds before the next answer; `messages` ends with a user's or a tool's turn.

        With `thinks`, the answer is asked to be thought out first where `enable_thinking: null` leaves that open.
        """

    def asks_thought(self, sample: Sample, place: int) -> bool:
        """Whether the answer at `place` is trained as one that was asked for with `thinks`."""
        return False

    def as_called(self, sample: Sample, thinks: bool = False) -> dict[str, Any]:
        """The arguments with which other programs render a conversation: `conversation`, `tools`, and what is asked of thoughts."""
        return {"conversation": as_dicts(sample.messages, sample.system), "tools": as_schemas(sample.tools)}

    def texts(self, sample: Sample, prompt: bool, thinks: bool = False) -> list[str] | None:
        """The text of each piece of a conversation, or of a prompt, where pieces are tokenised apart; nothing where they are not."""
        return None

    def answers_of(self, sample: Sample) -> list[bool] | None:
        """For each token of the whole conversation, whether marks of the template call it an answer's; nothing without such marks."""
        return None

    @property
    def chosen_dialect(self) -> "Dialect | None":
        """In which tools are described and called, where one was chosen."""
        return None

    @property
    def told(self) -> str:
        """How it is called in messages."""
        return f"template {self.name!r}"

    @property
    def shape(self) -> str:
        """All that shapes tokens beside the tokenizer, the name and the Jinja template."""
        return ""

    @property
    @abstractmethod
    def jinja(self) -> str | None:
        """The Jinja template that gives the same text, to be saved with the model."""


def template_names() -> list[str]:
    """What `template:` may say."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_template(
    options: TemplateOptions,
    tokenizer: "PreTrainedTokenizerBase",
    listed: Callable[[], str | None] = lambda: None,
    mask_history: bool = False,
) -> Template:
    """The template of a run. A named one may give the tokenizer stop words, an end and a pad token.

    A tokenizer that has no template of its own gets the one that is `listed` for its model, else `default`. One that was
    saved with a named template is served with that, piece by piece as it was trained. With `mask_history`, whose answers
    before the last are not learnt, the thoughts of those are taken out.
    """
    slots = import_module("finery.data.slots").SlotTemplate
    if options.name is None and (saved := tokenizer.chat_template):
        named = import_module("finery.data.slots_jinja").named_in(saved)
        if named is not None and (template := slots.saved(options, named, tokenizer, mask_history)) is not None:
            return template
        return import_module("finery.data.jinja").JinjaTemplate(tokenizer, options)
    return slots.load(options, options.name or listed() or "default", tokenizer, mask_history)
