"""What a callback is here: the hooks of Hugging Face's, with options of its own."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from finery.options import Finding, OptionGroup


class Callback:
    """Watches a run. `wanted` says whether this run has asked for it.

    It defines those hooks of `transformers.TrainerCallback` that it needs; the session joins it with that class, so
    that a run can be checked without importing transformers.
    """

    Options: ClassVar[type[OptionGroup]] = OptionGroup  # no keys, unless a subclass has some
    tracker: ClassVar[str] = ""
    """The service that it sends to, if any: see `finery.training.trackers`, which keeps its failures from ending a run."""

    def __init__(self, options: Any, plots: Sequence[str] = ()) -> None:
        self.options = options
        self.plots = plots
        self.trainer: Any = None  # set when the trainer exists

    @classmethod
    def wanted(cls, options: Any) -> bool:
        """Always, unless a subclass has a switch."""
        return True

    @property
    def secrets(self) -> Sequence[str]:
        """What must not be told, even in a complaint."""
        return ()

    def close(self) -> None:
        """Called when the loop ends, well or not."""

    def check(self, run: Any) -> Iterator[Finding]:
        """What does not fit together with other keys."""
        yield from ()
