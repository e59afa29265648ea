"""What Finery says while it works: plain lines on standard error, from the first process only."""

import logging
import os
import sys


class _Plain(logging.Formatter):
    """A message as it is; only trouble carries its level."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


class _Stderr(logging.StreamHandler):
    """Writes to what `sys.stderr` is at that moment, so that a progress bar or a test may redirect it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(_Plain())

    @property
    def stream(self) -> object:  # type: ignore[override]
        return sys.stderr


def plural(count: int, noun: str) -> str:
    """`1 sample`, `2,000 samples`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, set up on first use. Other ranks than the first only tell of errors."""
    root = logging.getLogger("finery")
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        root.addHandler(_Stderr())
        root.propagate = False
        root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    return logging.getLogger(name)
