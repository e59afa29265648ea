"""All that the pages say, in each language: data in texts/PART.LANGUAGE.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finery.files import read_yaml

LANGUAGES = {"en": "English", "zh": "中文", "ru": "Русский", "ko": "한국어", "ja": "日本語"}
"""Each by its own name."""
FIRST = "en"
"""What is shown where nothing says another one."""
FOLDER = Path(__file__).parent / "texts"


@dataclass(frozen=True)
class Texts:
    """One language."""

    told: Mapping[str, Any]

    def part(self, id: str) -> dict[str, Any]:
        """What a part says: `label`, `info`, `placeholder`, `value`; nothing where it says nothing.

        What several tabs have is told once, with the first of them.
        """
        tab, _, name = id.partition(".")
        found = self.told.get(tab, {}).get(name) or self.told["train"].get(name)
        return dict(found) if isinstance(found, Mapping) else {}

    def section(self, id: str) -> str:
        """A section's title: of one that several tabs have, by its name alone."""
        titles = self.told["sections"]
        return str(titles[id] if id in titles else titles[id.rpartition(".")[2]])

    def say(self, name: str, **values: Any) -> str:
        """A sentence, filled in."""
        return str(self.told["say"][name]).format(**values)

    def choices(self, id: str) -> Mapping[str, str]:
        """How choices are shown that say too little by themselves."""
        return self.told.get("choices", {}).get(id, {})


@cache
def texts(language: str) -> Texts:
    """A language's, over the English ones."""
    told: dict[str, Any] = {}
    for code in dict.fromkeys((FIRST, language if language in LANGUAGES else FIRST)):
        for group, entries in _of_files(code):
            told.setdefault(group, {}).update(entries)
    return Texts(told)


@cache
def _of_files(code: str) -> Sequence[tuple[str, Mapping[str, Any]]]:
    found = [read_yaml(path) for path in sorted(FOLDER.glob(f"*.{code}.yaml"))]
    return [pair for groups in found for pair in groups.items()]


def choices_of(spoken: Texts, id: str, choices: Sequence[str]) -> list[tuple[str, str]]:
    """Choices as a list shows them, with their values."""
    shown = spoken.choices(id)
    return [(str(shown.get(choice, choice)), choice) for choice in choices]


def preferred(accepted: str) -> str:
    """The language of a browser's `Accept-Language`, where there is one like it."""
    for part in accepted.split(","):
        code = part.partition(";")[0].strip().lower().partition("-")[0]
        if code in LANGUAGES:
            return code
    return FIRST
