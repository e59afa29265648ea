"""What a run settles by measurement or from memory: taken at a step boundary, written down, and obeyed when the run is resumed."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "choices.json"
"""In every checkpoint."""


@dataclass(frozen=True)
class Choice:
    """A value, why it was taken, and after how many optimizer steps."""

    value: Any
    why: str
    step: int = 0


class Choices:
    """Settled values by key: the user's own where given, else those of the checkpoint that is gone on with, else new ones."""

    def __init__(self, pinned: Mapping[str, Any], start: Path | None = None) -> None:
        self.pinned = pinned
        path = start / FILE if start is not None else None
        read = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
        self.remembered = {key: Choice(**fields) for key, fields in read.items()}
        self.made: dict[str, Choice] = {}

    def knows(self, key: str) -> bool:
        """Whether nothing has to be measured: the value is pinned or remembered."""
        return self.pinned.get(key) is not None or key in self.remembered

    def settle(self, key: str, choose: Callable[[], tuple[Any, str]]) -> Any:
        """The value of `key`; `choose` gives a new one and why."""
        if self.pinned.get(key) is not None:
            return self.pinned[key]
        self.made[key] = self.remembered.get(key) or Choice(*choose())
        return self.made[key].value

    def __getitem__(self, key: str) -> Any:
        """What counts now."""
        return self.made[key].value if key in self.made else self.pinned[key]

    def change(self, key: str, value: Any, why: str, step: int) -> None:
        """Something came up after `step` steps: from the next on, `value` counts."""
        self.made[key] = Choice(value, why, step)

    def decided(self) -> dict[str, tuple[Any, str]]:
        """For run.yaml: values and why, with the step where it is not the first."""
        return {key: (c.value, c.why + (f" (from step {c.step + 1} on)" if c.step else "")) for key, c in self.made.items()}

    def save(self, folder: Path) -> None:
        """Beside a checkpoint's state."""
        (folder / FILE).write_text(json.dumps({key: asdict(choice) for key, choice in self.made.items()}, indent=1), encoding="utf-8")
