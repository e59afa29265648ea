"""What a run does when it is told to end or to save: the step is finished first."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from finery.log import get_logger

log = get_logger(__name__)

ENDING = (signal.SIGTERM, signal.SIGINT)
SAVING = getattr(signal, "SIGUSR1", None)


@contextmanager
def saving_passed_over() -> Iterator[None]:
    """Before the first step and after the last there is nothing to save: SIGUSR1 is told then, and does not end the run."""
    alone = threading.current_thread() is threading.main_thread()
    if SAVING is None or not alone or signal.getsignal(SAVING) is not signal.SIG_DFL:
        yield
        return
    signal.signal(SAVING, lambda number, frame: log.warning("SIGUSR1: no steps are being trained now, so there is nothing to save"))
    try:
        yield
    finally:
        signal.signal(SAVING, signal.SIG_DFL)


class Signals:
    """Within its block, SIGTERM and SIGINT ask for an end, SIGUSR1 for a checkpoint; a second SIGTERM or SIGINT ends the process at once.

    Only a program's main thread hears signals: in another one, nothing is changed.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (*ENDING, *([SAVING] if SAVING is not None else [])):
                if signal.getsignal(number) is not signal.SIG_IGN:  # in the background of a script, Ctrl-C is for others
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == SAVING:
            self.save = True
            return
        if self.stop:
            os._exit(128 + number)
        self.stop = True
        log.warning("%s: the step is finished and saved, then the run ends; once more ends it at once", signal.Signals(number).name)
