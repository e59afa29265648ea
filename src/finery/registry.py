"""The folder is the registry: `stage: sft` means the one class that methods/sft.py exports."""

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from finery.errors import UserError, suggestion


class Registry:
    """Parts of one kind, a file each. A file is imported when its name is first asked for.

    Other packages add parts by an entry point in the group `finery.<kind>` that names a class.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.kind = package.rpartition(".")[2]

    @property
    def folder(self) -> Path:
        """Where the parts lie."""
        (path,) = import_module(self.package).__path__
        return Path(path)

    def names(self) -> list[str]:
        """What a user may write. No part is imported."""
        own = {path.stem for path in self.folder.glob("*.py")} - {"base", "__init__"}
        return sorted(own | self._foreign().keys())

    def __getitem__(self, name: str) -> type:
        if name not in (names := self.names()):
            hint = suggestion(name, names) or f"; there are: {', '.join(names)}"
            raise UserError(f"nothing in {self.kind} is called {name!r}{hint}")
        if foreign := self._foreign().get(name):
            return foreign.load()
        module = import_module(f"{self.package}.{name}")
        (export,) = module.__all__  # a part's file exports exactly one class
        return getattr(module, export)

    def says(self, name: str) -> str:
        """The first line of a part's docstring: its help everywhere. Read as text, nothing is imported."""
        path = self.folder / f"{name}.py"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
        return (text or "").partition("\n")[0]

    def _foreign(self) -> dict[str, Any]:
        return {point.name: point for point in _entry_points(f"finery.{self.kind}")}


@cache
def _entry_points(group: str) -> tuple[Any, ...]:
    return tuple(_of_all_packages().select(group=group))


@cache
def _of_all_packages() -> Any:
    """Entry points; packages are looked through once, however many kinds of parts there are."""
    from importlib.metadata import entry_points

    return entry_points()
