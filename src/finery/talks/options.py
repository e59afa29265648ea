"""How the answers of a talk are drawn: the keys of generation, and what one conversation may choose for itself."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from finery.engines.base import GenerationOptions
from finery.errors import Complaint, UserError, suggestion
from finery.options import Entry, shown
from finery.reader import scalar
from finery.run import Run


class TalkOptions(GenerationOptions):
    first: ClassVar[tuple[str, ...]] = ("max_new_tokens", "temperature", "top_p", "seed", "enable_thinking")
    """What is changed most."""

    seed: int | None = Field(None, ge=0, lt=2**63)
    """With the same one a question is answered in the same way; empty: each time in another."""
    enable_thinking: bool = True
    """Whether models that think before they answer are to do so."""

    @classmethod
    def of(cls, run: Run) -> Self:
        """As the run's keys say."""
        return cls(**run.generation.model_dump(), enable_thinking=bool(run.template.enable_thinking))

    def changed(self, **values: object) -> Self:
        """With other values; raises `UserError` with all that do not fit. An empty one means the default."""
        UserError.raise_any(
            f"there is no setting {name!r}{suggestion(name, type(self).model_fields)}"
            for name in values
            if name not in type(self).model_fields
        )
        complaints: list[Complaint] = []
        found = self.claim({name: Entry(value, "") for name, value in (self.model_dump() | values).items()}, complaints)
        UserError.raise_any(complaints)
        return found

    def changed_by(self, words: list[str]) -> Self:
        """As `changed`, from words such as `temperature=0.2`."""
        UserError.raise_any(f"a setting is changed by name=value, found {word!r}" for word in words if "=" not in word)
        return self.changed(**{name: scalar(value) for name, _, value in (word.partition("=") for word in words)})

    def told(self) -> list[str]:
        """Every value, as it would be set."""
        return [f"{name}={'' if value is None else shown(value)}" for name, value in self.model_dump().items()]
