"""The controls of the board: what `controls.yaml` says of each, and what the key's own options say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from finery.files import read_yaml
from finery.keys import Key, Schema, all_keys

Kind = Literal["switch", "slider", "choice", "text"]
ANY = "*"
"""In `when`: whatever is not nothing."""


@dataclass(frozen=True)
class Control:
    """One control, as far as no page is drawn yet."""

    id: str  # TAB.NAME, as saved settings have it
    section: str
    keys: Mapping[str, Any]  # those that it sets; for each the value that "on" means, `...` where that is the control's own
    schema: Schema  # of its key; empty where it has none, or several
    default: Any
    choices: Sequence[str] | None = None  # an empty list is filled by the page
    values: Mapping[str, Mapping[str, Any]] | None = None
    least: float | None = None
    most: float | None = None
    step: float | None = None
    many: bool = False
    free: bool = False
    secret: bool = False
    always: bool = False
    nothing: Any = None
    when: Mapping[str, Sequence[Any]] | None = None

    @property
    def tab(self) -> str:
        """Of the page."""
        return self.id.partition(".")[0]

    @property
    def name(self) -> str:
        """Without the tab."""
        return self.id.partition(".")[2]

    @property
    def kind(self) -> Kind:
        """How it is drawn."""
        if self.choices is not None:
            return "choice"
        if self.most is not None:
            return "slider"
        return "switch" if isinstance(self.default, bool) else "text"

    @property
    def begins(self) -> Any:
        """What it holds at first, in the form in which it is drawn."""
        if self.kind == "text":
            return "" if self.default is None else ",".join(self.default) if isinstance(self.default, (list, tuple)) else str(self.default)
        if self.kind == "choice":
            return list(self.default or []) if self.many else self.default
        if self.kind == "slider":
            return self.least if self.default is None else self.default
        return bool(self.default)

    def asks(self, value: Any) -> bool:
        """Whether a value sets anything."""
        empty = value in (None, "", []) or (isinstance(value, bool) and not value and self.default is False)
        return not empty and not _same(value, self.nothing)

    def counts(self, values: Mapping[str, Any]) -> bool:
        """Whether it is read while the controls hold `values`."""
        for id, wanted in (self.when or {}).items():
            held = values.get(id)
            if not (ANY in wanted and controls()[id].asks(held)) and not any(_same(held, one) for one in wanted):
                return False
        return True


def _same(one: Any, other: Any) -> bool:
    return one is not None and other is not None and str(one).lower() == str(other).lower()


@cache
def controls() -> dict[str, Control]:
    """Every control, in the order of the page."""
    told = read_yaml(Path(__file__).parent / "controls.yaml")
    known = {key.name: key for key in all_keys()}
    found: dict[str, Control] = {}
    for tab, sections in told.items():
        for section, entries in sections.items():
            shared = entries.pop("when", None)
            for name, entry in entries.items():
                found[f"{tab}.{name}"] = _control(f"{tab}.{name}", section, _with(entry, shared), known)
    return found


def _with(entry: Mapping[str, Any], shared: Mapping[str, Any] | None) -> dict[str, Any]:
    when = {**(shared or {}), **entry.get("when", {})}
    return {**entry, "when": when} if when else dict(entry)


def _control(id: str, section: str, entry: dict[str, Any], known: Mapping[str, Key]) -> Control:
    values = entry.pop("values", None)
    several = entry.pop("keys", None)
    own = entry.pop("key", None if values or several or "key" in entry else id.partition(".")[2]) if not several else None
    if values:
        keys = {key: ... for set_ in values.values() for key in set_}
        entry["choices"] = tuple(values)
    else:
        keys = several or ({own: ...} if own else {})
    schema = known[own].schema if own else {}
    entry.setdefault("default", False if several else schema.get("default"))
    if "choices" not in entry and "enum" in _plain(schema):
        entry["choices"] = tuple(_plain(schema)["enum"])
    return Control(id=id, section=section, keys=keys, schema=schema, values=values, **entry)


def _plain(schema: Schema) -> Schema:
    """A key's type where it may also be empty."""
    variants = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    return variants[0] if variants else {}
