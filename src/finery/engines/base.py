"""What an engine is: prompts in, text out, many at a time, piece by piece."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field

from finery.options import OptionGroup

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from finery.models.adapters.base import Adapter
    from finery.models.load import ModelOptions
    from finery.models.quantizers.base import Quantizing
    from finery.models.trained import Trained


class GenerationOptions(OptionGroup):
    do_sample: bool = True
    """Draw tokens by chance; false: always the likeliest."""
    temperature: float = Field(0.95, ge=0)
    """How evenly tokens are drawn; 0 means the likeliest."""
    top_p: float = Field(0.7, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = Field(50, ge=0)
    """Draw from so many of the likeliest tokens; 0: from all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Draw only tokens that are at least so likely as this share of the likeliest one's probability."""
    max_new_tokens: int = Field(1024, gt=0)
    """The longest answer, in tokens."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1: tokens that stand in the text already, the prompt's too, become less likely (their scores are divided by it)."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """What is taken off the score of a token that the answer holds already."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """What is taken off the score of a token for each time that the answer holds it."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the answer's text."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return not self.do_sample or self.temperature == 0


class EngineOptions(OptionGroup):
    """What the engines in this process share (huggingface, openvino, llamacpp)."""

    max_batch_size: int = Field(32, gt=0)
    """So many answers are generated together by huggingface, openvino and llamacpp; others wait."""
    prefill_chunk: int = Field(512, gt=0)
    """Tokens of prompts that are read between two tokens of the answers that are on their way."""
    gguf_type: Literal["q8_0", "f16"] | None = None
    """Numbers of the GGUF file that is written into the cache for openvino and llamacpp where 'model_name_or_path' names none, or where an
    adapter goes into it. Not given: q8_0 for openvino, f16 for llamacpp, which would round to 8 bits what q8_0 is multiplied with, too."""


class Constraint(Protocol):
    """What may come next, for answers that must have a form; one for each answer, told of every token of it."""

    def allowed(self) -> NDArray[np.int64] | None:
        """Ids that may come next; nothing where all may."""
        ...

    def take(self, token: int) -> None:
        """A token was chosen."""
        ...


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted."""

    prompt_ids: Sequence[int]
    options: GenerationOptions
    stop: Sequence[str] = ()  # texts at which the answer ends; they are not a part of it
    seed: int | None = None  # of this answer alone: the same one, whatever else is asked at the same time
    num_logprobs: int | None = None  # how many of the likeliest tokens are told beside each; 0: its own alone; None: nothing
    constraint: Constraint | None = None
    adapter: str | None = None  # a name of `Engine.adapters`; None: the first


@dataclass(frozen=True)
class Token:
    """A token of an answer. Logprobs are those of the model itself, before penalties, temperature and whatever restricts the choice."""

    id: int
    logprob: float | None = None
    likeliest: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Piece:
    """What has come: tokens, and the text that is certain by now; characters and stop texts that are not whole yet wait."""

    text: str
    tokens: Sequence[Token] = ()
    finish: Literal["stop", "length"] | None = None  # in the last piece of all: a stop token or text, or so many tokens as were allowed


@dataclass
class Stream:
    """An answer on its way: pieces, to be iterated by one reader in any thread. `close` ends the generation.

    Whoever reads in another way sets `listen`, which is called (in the engine's thread, it must be quick) for each piece or error, and
    for those that have come before at once.
    """

    cancelled: bool = False
    _come: SimpleQueue[Piece | BaseException] = field(default_factory=SimpleQueue)
    _listener: Callable[[Piece | BaseException], None] | None = None
    _ended: bool = False
    _turn: threading.RLock = field(default_factory=threading.RLock)

    def put(self, what: Piece | BaseException) -> None:
        """For the engine: the next piece, or what has gone wrong."""
        with self._turn:
            if self._listener is not None:
                self._listener(what)
            else:
                self._come.put(what)

    def listen(self, listener: Callable[[Piece | BaseException], None]) -> None:
        """Have pieces handed over. To be set before anything else reads."""
        with self._turn:  # a piece that comes meanwhile is handed over after those before it
            self._listener = listener
            while not self._come.empty():
                listener(self._come.get())

    def close(self) -> None:
        """The rest is not wanted."""
        self.cancelled = True

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if self._ended or self.cancelled:
            raise StopIteration
        what = self._come.get()
        if isinstance(what, BaseException):
            self._ended = True
            raise what
        self._ended = what.finish is not None
        return what


@dataclass(frozen=True)
class Source:
    """What an engine is to answer with: nothing of it is loaded yet but the tokenizer."""

    trained: Trained  # the base and the adapters that go into it
    adapter: Adapter  # how they do
    model: ModelOptions
    quantizing: Quantizing | None
    tokenizer: Any
    stop_ids: frozenset[int]
    served: Mapping[str, Path] = field(default_factory=dict)  # folders of adapters that stay beside the model, chosen by name
    shared: EngineOptions = field(default_factory=lambda: EngineOptions.model_validate({}))


class Engine(ABC):
    """Generates text with one loaded model, many answers at a time."""

    Options: ClassVar[type[OptionGroup]] = OptionGroup  # no keys, unless a subclass has some

    @classmethod
    def open(cls, source: Source, options: Any) -> Engine:
        """Load what is to answer; `options` are of this engine's `Options`, what does not fit together is said by their `check`."""
        raise NotImplementedError

    @property
    def adapters(self) -> Sequence[str]:
        """Names by which `Ask.adapter` chooses; none where the model answers as it is alone."""
        return ()

    @property
    @abstractmethod
    def longest(self) -> int:
        """How many tokens prompt and answer may have together."""

    @abstractmethod
    def begin(self, ask: Ask) -> Stream:
        """Queue an answer; from any thread. Raises `UserError` where it cannot be given at all (a prompt that is too long)."""

    @abstractmethod
    def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The mean of the last hidden states of each prompt's tokens, (prompts, width); raises `UserError` where an engine has none."""

    @abstractmethod
    def close(self) -> None:
        """End all answers; those that read them are told."""

    def stream(self, prompt_ids: Sequence[int], options: GenerationOptions) -> Iterator[str]:
        """One answer, text by text; leaving the iterator stops the generation."""
        answer = self.begin(Ask(prompt_ids, options))
        try:
            for piece in answer:
                if piece.text:
                    yield piece.text
        finally:
            answer.close()

    def generate(self, prompt_ids: Sequence[int], options: GenerationOptions) -> str:
        """The whole of one answer."""
        return "".join(self.stream(prompt_ids, options))
