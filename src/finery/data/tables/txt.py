"""Plain text: each line is a record with the column `text`."""

from typing import Any

from finery.data.tables.jsonl import JSONLines

__all__ = ["Text"]


class Text(JSONLines):
    """Lines as they are; an empty line is an empty text."""

    keeps_blank = True

    def __getitem__(self, row: int) -> Any:
        return {"text": self.text(row).removesuffix("\r")}

    def json_text(self, row: int) -> str | None:
        """A line is no JSON."""
        return None
