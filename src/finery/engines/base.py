"""What an engine is: prompts in, text out, streamed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from finery.options import OptionGroup


class GenerationOptions(OptionGroup):
    do_sample: bool = True
    """Draw tokens by chance; false: always the likeliest."""
    temperature: float = Field(0.95, ge=0)
    """How evenly tokens are drawn; 0 means the likeliest."""
    top_p: float = Field(0.7, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = Field(50, ge=0)
    """Draw from so many of the likeliest tokens; 0: from all."""
    max_new_tokens: int = Field(1024, gt=0)
    """The longest answer, in tokens."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1: tokens that stand in the text already become less likely."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the answer's text."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return not self.do_sample or self.temperature == 0


class Engine(ABC):
    """Generates text with one loaded model."""

    Options: ClassVar[type[OptionGroup]] = OptionGroup  # no keys, unless a subclass has some

    @abstractmethod
    def __init__(self, model: Any, tokenizer: Any, stop_ids: frozenset[int], options: Any) -> None:
        """`options` are of this engine's `Options`; what does not fit together is said by their `check`."""

    @abstractmethod
    def stream(self, prompt_ids: list[int], options: GenerationOptions) -> Iterator[str]:
        """The answer, piece by piece; leaving the iterator stops the generation."""

    def generate(self, prompt_ids: list[int], options: GenerationOptions) -> str:
        """The whole answer."""
        return "".join(self.stream(prompt_ids, options))
