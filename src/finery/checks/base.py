"""What a check is, and what it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Effect = Literal["stops the run", "left out", "kept"]
"""What training does about it: it does not begin, it passes the rows over, or it takes them as they stand."""


@dataclass(frozen=True)
class Finding:
    """Something to be mended: where, what was found, what would do."""

    place: str  # a key, a file, or `file:row:path`, rows counted from 0
    what: str
    mend: str = ""
    effect: Effect = "kept"
    rows: tuple[str, ...] = ()  # the first of the rows that it is true of, as `file:row`
    num_rows: int = 0
    line: int | None = None  # of the first row, where its file has lines

    @property
    def fatal(self) -> bool:
        """Whether training would refuse to begin."""
        return self.effect == "stops the run"

    def __str__(self) -> str:
        about = [f"line {self.line}"] if self.line else []
        if self.num_rows > 1:
            file = self.rows[0].rpartition(":")[0]
            names = [name.removeprefix(f"{file}:") for name in self.rows]
            about.append(f"{self.num_rows:,} rows: {', '.join(names)}{', …' if self.num_rows > len(names) else ''}")
        if self.effect != "kept":
            about.append(self.effect)
        told = "; ".join(filter(None, (self.what, self.mend)))
        return f"{self.place}: {told}" + (f" ({'; '.join(about)})" if about else "")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Checked:
    """What was looked at whole, whether anything was found or not."""

    name: str
    num_rows: int
    num_used: int  # rows that can be learnt
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        left_out = self.num_rows - self.num_used
        told = f", {left_out:,} of them left out" if left_out else ""
        rows = f"{self.num_rows:,}{self.note} {'row' if self.num_rows == 1 else 'rows'}"
        return f"{self.name}: {rows} in {self.seconds:.1f} s{told}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Check(ABC):
    """Looks for what is wrong with a run before it begins; it trains nothing and changes nothing."""

    def __init__(self) -> None:
        self.checked: list[Checked] = []
        """What was looked at so far."""

    @abstractmethod
    def findings(self, run: Any) -> Iterator[Finding]:
        """What there is to mend about a `finery.run.Run`, each as soon as it is known."""
