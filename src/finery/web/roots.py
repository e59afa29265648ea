"""Which folders the page may touch: none but those that whoever started it has opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finery.errors import UserError


@dataclass(frozen=True)
class Roots:
    """Paths that lie in one of these folders may be named; a relative one is meant from the first."""

    folders: Sequence[Path]

    @property
    def home(self) -> Path:
        """Where runs begin, as a shell's would that stands there."""
        return self.folders[0]

    def path(self, text: str, key: str) -> Path:
        """The place that a text names, links followed; raises `UserError` where that is outside."""
        if "\0" in text:
            raise UserError(f"{key!r} names no path")
        try:
            found = (self.home / Path(text).expanduser()).resolve()
        except (OSError, RuntimeError):
            raise UserError(f"{key!r} names no path, found {text!r}") from None
        if not any(found.is_relative_to(folder) for folder in self.folders):
            there = ", ".join(map(str, self.folders))
            raise UserError(
                f"{key!r} names {text}, which is outside of what this page may touch ({there}); 'finery webui --root DIR' opens more"
            )
        return found

    def named(self, path: Path) -> str:
        """A place as the page names it: from its own folder where it lies in there."""
        return str(path.relative_to(self.home) if path.is_relative_to(self.home) else path)

    def look_at(self, keys: Mapping[str, Any]) -> None:
        """Raise `UserError` for a key of a run that names a place outside, or takes a variable of the server's environment."""
        for key, value in keys.items():
            for text in _texts(value):
                if "${" in text:
                    raise UserError(f"{key!r} takes values from elsewhere, found {text!r}; on a page, write them out")
                if "\0" in text or text.startswith("file:"):
                    raise UserError(f"{key!r} names no path that a page may use, found {text!r}")
                if self._may_leave(text):
                    self.path(text, key)

    def _may_leave(self, text: str) -> bool:
        """Whether a text, if it is a path, is one that leads out: it begins at the root, climbs, or goes through a link."""
        if text.startswith(("/", "~", "\\")) or ".." in Path(text).parts:
            return True
        try:
            return not (self.home / text).resolve().is_relative_to(self.home)
        except OSError:  # too long for a path
            return False


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value, *(part.strip() for part in value.split(",") if "," in value)]
    if isinstance(value, Mapping):
        return [text for one in value.values() for text in _texts(one)]
    return [text for one in value for text in _texts(one)] if isinstance(value, (list, tuple)) else []
