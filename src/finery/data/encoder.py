"""Encoding beside the training: processes that keep ahead of the steps, in the order in which samples are dealt."""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray, RawValue
from typing import Any

import numpy as np

from finery.data.content import ContentGuard
from finery.data.mixing import Part
from finery.data.order import Order
from finery.data.rows.base import Encoded, Rows
from finery.data.sample import BadRecord
from finery.data.sources import Source
from finery.data.store import StoreWriter, TokenStore
from finery.data.tokenise import Asking, together
from finery.errors import UserError
from finery.log import get_logger

log = get_logger(__name__)

CHUNK = 64
"""Samples that a process encodes before it writes them and looks about."""
LOOKAHEAD = 1024
"""How many samples the encoding keeps ahead of the steps, at least."""
GUARD_SECONDS = 60.0
"""How long the end of a run waits until its files are found to be what they were taken for."""
_PATIENCE_SECONDS = 2.0
MOST_TOLD = 20
"""How many kinds of left-out samples are told while they are met."""
_IDLE_SECONDS = 0.005
_LOOK_SECONDS = 0.002
_MOST_LOOKS = 50
"""So often in a row the processes are seen idle until a sample that nobody has asked for is no longer waited for."""
_MESSAGE_BYTES = 1 << 15
_WHY = {
    signal.SIGKILL: "; perhaps there was too little memory",
    signal.SIGBUS: "; perhaps the disk that holds the cache is full (FINERY_CACHE names another folder), or the data file was cut short",
}
"""What ends a process that encodes, by signal."""


def kind_of(reason: str) -> str:
    """Reasons that differ only in numbers, such as the place in a record, are of one kind."""
    return re.sub(r"\d+", "#", reason)


@dataclass
class Feed:
    """One set that is encoded in the order in which it is dealt."""

    part: Part
    order: Order
    sources: Sequence[Source]
    stores: Sequence[TokenStore]

    def missing(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Data sets and rows of the samples dealt from place `start` on, epochs counted through, that are not encoded."""
        size = len(self.part)
        epoch, first = divmod(start, size)
        units = self.order.at(epoch, first, first + stop - start)
        sources, rows = self.part.locate(units)
        absent = np.ones(len(rows), bool)
        for number, store in enumerate(self.stores):
            inside = sources == number
            if inside.any():
                absent[inside] = ~store.has(rows[inside])
        return sources[absent], rows[absent]


class _Bad(Encoded):
    """What a record becomes that is no sample."""


class _Shared:
    """What the processes see of each other."""

    def __init__(self, num_feeds: int, num_workers: int) -> None:
        self.begin: Any = RawArray(ctypes.c_int64, num_feeds)  # from which place on each feed is to be encoded
        self.wanted: Any = RawArray(ctypes.c_int64, num_feeds)  # up to which
        self.busy: Any = RawArray(ctypes.c_int64, 2 * num_workers)  # source and row that each process is at
        self.done: Any = RawArray(ctypes.c_int64, num_workers)  # samples encoded by each
        self.idle: Any = RawArray(ctypes.c_int64, num_workers)  # 1 where one has encoded all that is wanted
        self.failed: Any = RawValue(ctypes.c_int64, 0)  # 1: what a user can mend, 2: a fault of ours
        self.message: Any = RawArray(ctypes.c_char, _MESSAGE_BYTES)
        self.stop: Any = RawValue(ctypes.c_int64, 0)

    def fail(self, message: str, kind: int) -> None:
        """Tell everybody; the first message stands."""
        if not self.failed.value:
            self.message.value = message.encode(errors="replace")[: _MESSAGE_BYTES - 1]
            self.failed.value = kind


class Encoder:
    """The processes that encode what one run reads. Without any, it only waits for what another process of the run writes."""

    def __init__(self, rows: Rows, feeds: Sequence[Feed], num_workers: int, guard: ContentGuard | None = None) -> None:
        self.feeds = feeds
        self.rows = rows
        self.guard = guard
        self.shared = _Shared(len(feeds), max(num_workers, 1))
        self._num_workers = num_workers
        self._processes: list[Any] = []
        self._notes: list[Any] = []
        self._told: set[tuple[int, str]] = set()
        self._telling = threading.Lock()  # a pipe that two threads read from gives neither a whole note
        self._thread: threading.Thread | None = None
        context = multiprocessing.get_context("fork")
        streamed = any(source.sequential for feed in feeds[:1] for source in feed.sources)
        for number in range(num_workers):
            heard, says = context.Pipe(duplex=False)
            self._notes.append(heard)
            work = _Work(rows, feeds, self.shared, number, num_workers, os.getpid(), says)
            if streamed:  # a library that reads from the network has threads of its own, which do not live on in a forked process
                self._thread = threading.Thread(target=work.run, daemon=True, name="finery encoder")
                self._thread.start()
            else:
                process = context.Process(target=work.run_forked, daemon=True, name=f"finery encoder {number}")
                process.start()
                self._processes.append(process)
        if num_workers:
            threading.Thread(target=self._watch, daemon=True, name="encoder watch").start()

    def seek(self, feed: int, place: int) -> None:
        """The loop begins at `place` of a feed, epochs counted through: what lies before is not wanted."""
        self.shared.begin[feed] = place

    def want(self, feed: int, place: int) -> None:
        """The loop wants what lies before `place` soon. Raises what has gone wrong since it was last asked."""
        self.check()
        self.shared.wanted[feed] = place

    def check(self) -> None:
        """Raise what has gone wrong beside the training."""
        if self.guard is not None and self.guard.problem:
            self._forget()
            raise UserError(self.guard.problem)
        if self.shared.failed.value == 1:
            raise UserError(*self.shared.message.value.decode(errors="replace").split("\n"))
        if self.shared.failed.value:
            raise RuntimeError(self.shared.message.value.decode(errors="replace"))

    def wait(self, store: TokenStore, record: int) -> None:
        """Until a record is encoded, or it is plain that none of the processes is about to; raises what prevents it."""
        idle = 0
        while not store.entries["present"][record] and idle < _MOST_LOOKS:
            self.check()
            idle = idle + 1 if self._is_idle() else 0
            time.sleep(_LOOK_SECONDS)

    def _is_idle(self) -> bool:
        return bool(self.shared.stop.value or (self._num_workers and all(self.shared.idle)))

    def num_done(self) -> int:
        """Samples encoded by this run so far."""
        return sum(self.shared.done)

    def stop(self) -> None:
        """End the processes."""
        self.shared.stop.value = 1
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.terminate()
        self._processes = []
        if self._thread is not None:
            self._thread.join(5)
        self._tell()

    def confirm(self) -> None:
        """At the end of a run: raise what went wrong, once its files are found to be what they were taken for."""
        if self.guard is not None and self.guard.is_alive():  # a short run may end before its files are read
            self.guard.join(_PATIENCE_SECONDS)
            if self.guard.is_alive():
                log.info("looking whether the data files are those that the run began with; up to %.0f s", GUARD_SECONDS)
                self.guard.join(GUARD_SECONDS)
            if self.guard.is_alive():
                log.warning("whether the data files are those that the run began with is not known: reading them takes too long")
        self.check()

    def _forget(self) -> None:
        """The files are not what they were taken for: nothing of what this run may have written is to be used again."""
        if self._num_workers:
            for feed in self.feeds:
                for store in feed.stores:
                    store.entries["present"] = 0

    def _watch(self) -> None:
        """Notice within a moment when a process ends that should not have."""
        while not self.shared.stop.value:
            self._tell()
            for number, process in enumerate(self._processes):
                code = process.exitcode
                if code and not self.shared.stop.value:
                    how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
                    self.shared.fail(f"a process that encodes rows {how}{_WHY.get(-code, '')}, while it was at {self._place(number)}", 1)
                    return
            time.sleep(0.1)

    def _tell(self) -> None:
        """Say which samples were left out, the first of each kind at once; the ledger has them all."""
        with self._telling:
            for heard in self._notes:
                try:
                    while heard.poll():
                        source, row, reason = heard.recv()
                        if (source, kind_of(reason)) not in self._told and len(self._told) < MOST_TOLD:
                            self._told.add((source, kind_of(reason)))
                            found = self.feeds[0].sources[source]
                            log.warning("data set %s: %s is left out: %s", found.name, found.place(row), reason)
                except (EOFError, OSError):  # the process has ended
                    continue

    def _place(self, number: int) -> str:
        source, row = self.shared.busy[2 * number], self.shared.busy[2 * number + 1]
        return self.feeds[0].sources[source].told(row)


class _Work:
    """One process: encodes each n-th chunk of every feed's order, up to where it is wanted."""

    def __init__(self, rows: Rows, feeds: Sequence[Feed], shared: _Shared, number: int, count: int, parent: int, says: Any) -> None:
        self.rows = rows
        self.feeds = feeds
        self.shared = shared
        self.number = number
        self.count = count
        self.parent = parent
        self.says = says
        self.noted: set[tuple[int, str]] = set()
        self.next = [number] * len(feeds)  # chunk
        self.writers: dict[int, StoreWriter] = {}

    def run_forked(self) -> None:
        """As `run`, in a process of its own."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        gc.freeze()  # what was there before the fork is not looked at again, nor copied for that
        gc.set_threshold(50_000, 20, 100)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.run()

    def run(self) -> None:
        """Until told to stop, or the parent is gone."""
        try:
            while not self.shared.stop.value and self.parent in (os.getppid(), os.getpid()):
                if not any(self._turn(feed) for feed in range(len(self.feeds))):
                    self.shared.idle[self.number] = 1
                    time.sleep(_IDLE_SECONDS)
        except UserError as error:
            self.shared.fail("\n".join(error.complaints), 1)
        except OSError as error:
            self.shared.fail(self._told(error), 1)
        except Exception:  # whatever it is, the run must hear of it
            self.shared.fail(f"encoding {self._place()} failed:\n{traceback.format_exc()}", 2)

    def _turn(self, number: int) -> bool:
        """Encode one chunk of a feed, if one is wanted."""
        feed, size = self.feeds[number], len(self.feeds[number].part)
        begin = self.shared.begin[number]
        first = begin // CHUNK
        chunk = max(self.next[number], first + (self.number - first) % self.count)
        start = chunk * CHUNK
        if start >= min(self.shared.wanted[number], begin + size):  # once around, and every sample is some process's
            return False
        self.shared.idle[self.number] = 0
        self.next[number] = chunk + self.count
        stop = start + CHUNK  # whole, since it is not come back to
        while start < stop:  # a chunk may reach into the next epoch
            end = min(stop, (start // size + 1) * size)
            self._encode(feed, *feed.missing(start, end))
            start = end
        return True

    def _encode(self, feed: Feed, sources: np.ndarray, rows: np.ndarray) -> None:
        for source in np.unique(sources).tolist():
            records = rows[sources == source].tolist()
            encoded = self._all(feed.sources[source], source, records)
            if id(feed.stores[source]) not in self.writers:
                self.writers[id(feed.stores[source])] = StoreWriter(feed.stores[source])
            self.writers[id(feed.stores[source])].put(records, encoded)
            for record, one in zip(records, encoded, strict=True):
                if not one.rows:
                    self._note(source, record, one.reason)
            self.shared.done[self.number] += len(records)

    def _all(self, source: Source, number: int, records: list[int]) -> list[Encoded]:
        ids = self.rows.template.tokenise.ids
        try:
            drafts = together([self._one(source, number, record) for record in records], ids)
        except UserError:
            raise
        except Exception:  # one at a time, then, so that it is known whose fault it is
            drafts = [together([self._one(source, number, record)], ids)[0] for record in records]
        made = iter(self.rows.finish([draft for draft in drafts if not isinstance(draft, _Bad)]))
        return [draft if isinstance(draft, _Bad) else next(made) for draft in drafts]

    def _one(self, source: Source, number: int, row: int) -> Asking[Any]:
        """The draft of a record, or why it is none."""
        self.shared.busy[2 * self.number], self.shared.busy[2 * self.number + 1] = number, row
        try:
            return (yield from self.rows.draft(source.sample(row)))
        except BadRecord as error:
            return _Bad((), str(error))
        except UserError as error:
            raise UserError(*(f"{source.told(row)}: {line}" for line in error.complaints)) from None

    def _note(self, source: int, record: int, reason: str) -> None:
        if (source, kind_of(reason)) not in self.noted and len(self.noted) < MOST_TOLD:
            self.noted.add((source, kind_of(reason)))
            self.says.send((source, record, reason))

    def _place(self) -> str:
        source = self.feeds[0].sources[self.shared.busy[2 * self.number]]
        return source.told(self.shared.busy[2 * self.number + 1])

    def _told(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = self.feeds[0].stores[0].folder
            return (
                f"the disk that holds the cache {folder} is full; make room, or set FINERY_CACHE to a folder on another disk. "
                "What was encoded so far is kept"
            )
        return f"encoding {self._place()} failed: {error}"
