"""Keys, declared beside the code that reads them, and claimed from what the user wrote."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from reprlib import Repr
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from finery.errors import Complaint, nearest


@dataclass(frozen=True)
class Entry:
    """A value and where it was written: `x.yaml:7`, `command line` or `Python`."""

    value: Any
    source: str
    faulty: bool = False  # it could not be read, and a complaint says so; the value is None


Keys = dict[str, Entry]


@dataclass(frozen=True)
class Finding:
    """What a part has to say about keys that do not fit together; fatal ones stop the run."""

    key: str
    text: str  # quotes the other keys that it is about before it says what was found
    fatal: bool = True

    @property
    def keys(self) -> set[str]:
        """All keys that it is about."""
        return {self.key, *re.findall(r"'(\w+)", self.text.partition(", found ")[0])}


def _split(value: object) -> object:
    """`a, b` and `[a, b]` are the same list."""
    words = value.split(",") if isinstance(value, str) else value
    return tuple(str(word).strip() for word in words if str(word).strip()) if isinstance(words, (list, tuple)) else words


PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path, in which `~` is the user's home."""
CommaList = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Several names: a YAML list, or one string with commas."""


class OptionGroup(BaseModel):
    """A part's keys. The text under a field is its help, in the CLI, the docs and the web form."""

    model_config = ConfigDict(
        frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, extra="forbid", coerce_numbers_to_str=True, protected_namespaces=()
    )

    nulls: ClassVar[frozenset[str]] = frozenset()
    """Keys of which an empty value (null) says something else than the default."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_numbers_from_bools(cls, value: object, info: Any) -> object:
        """pydantic reads `true` as 1; whoever wrote `lora_rank: true` meant something else."""
        annotation = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and "bool" not in annotation and ("int" in annotation or "float" in annotation):
            raise ValueError("should be a number" if "float" in annotation else "should be a whole number")
        return value

    @classmethod
    def claim(cls, keys: Keys, complaints: list[Complaint]) -> Self:
        """Take this group's keys out of `keys`; what stays there is somebody else's.

        What is wrong with a value is appended to `complaints`, and the key has its default then (no text where it
        has none), so that the other keys can be looked at. An empty value (null) means the default.
        """
        taken = {name: keys.pop(name) for name in cls.model_fields if name in keys}
        given = {name: entry.value for name, entry in taken.items() if entry.value is not None or name in cls.nulls}
        try:
            return cls(**given)
        except ValidationError as error:
            faults: dict[str, list[ErrorDetails]] = {}
            for detail in error.errors():
                faults.setdefault(str(detail["loc"][0]), []).append(detail)
            complaints += [text for details in faults.values() for text in _complaints(details, taken)]
            stand_ins = {name: "" for name in faults if cls.model_fields[name].is_required()}
            return cls(**{name: value for name, value in given.items() if name not in faults}, **stand_ins)

    def check(self, run: Any) -> Iterator[Finding]:
        """What does not fit together with other keys of `run` (a `finery.run.Run`)."""
        yield from ()


_SHORT = Repr()
_SHORT.maxlevel = 4
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 30
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200
"""Aliases can make a short file an endless value."""


def shown(value: object) -> str:
    """A value as the user would write it, cut where it is long."""
    text = {"True": "true", "False": "false", "None": "null"}.get(told := _SHORT.repr(value), told)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_of(value: object, choices: Iterable[str]) -> str:
    """`should be one of a, b, c (did you mean 'b'?)`; of many only the nearest is told, where one is near."""
    choices = list(choices)
    longer = (choice for choice in choices if isinstance(value, str) and len(value) > 2 and choice.startswith(value))
    near = next(longer, None) or (nearest(value, choices) if isinstance(value, str) else None)
    if near is None:
        return f"should be one of {', '.join(choices)}"
    known = f"{len(choices)} names" if len(choices) > 15 else ", ".join(choices)
    return f"should be one of {known} (did you mean {near!r}?)"


def _complaints(details: list[ErrorDetails], taken: Keys) -> Iterator[Complaint]:
    """What is wrong with one key: several details are several places in it, or the several types it may have."""
    key = str(details[0]["loc"][0])
    source = taken[key].source if key in taken else ""
    if key in taken and taken[key].faulty:
        return
    if key not in taken or taken[key].value is None:
        yield Complaint(
            f"{key!r} is empty and is needed" if source else f"{key!r} is needed and was not given", source, [key], follows=not source
        )
    elif len(details) > 1 and all(detail["input"] is taken[key].value for detail in details):
        wanted = " or ".join(_wanted(detail).removeprefix("should be ") for detail in details)
        yield Complaint(f"{key!r} should be {wanted}, found {shown(taken[key].value)}", source, [key])
    else:
        for detail in details:
            path = ".".join(str(part) for part in detail["loc"] if not str(part).startswith(("function-", "tuple", "literal[")))
            yield Complaint(f"{path!r} {_wanted(detail)}, found {shown(detail['input'])}", source, [key])


def _wanted(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    kind = detail["type"]
    if kind == "literal_error":
        return one_of(detail["input"], context["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    bounds = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below", "less_than_equal": "at most"}
    if kind in bounds:
        (bound,) = context.values()
        return f"should be {bounds[kind]} {bound:g}"
    named = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text",
        "dict": "a mapping",
        "tuple": "names with commas between them, or a list",
    }
    for word, name in named.items():
        if kind.startswith(word):
            return f"should be {name}"
    return detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
