"""Hub data sets that are read while they train: rows come as they are asked for, shuffled within a buffer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.data.registry import DatasetEntry, StreamSettings
from finery.data.tables.base import Table
from finery.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset


class StreamTable(Table):
    """Rows of a stream, numbered as they come; from the start again, in another order, when it ends.

    It is read onward: a row before the last one asked for means opening it anew.
    """

    sequential = True

    def __init__(self, name: str, entry: DatasetEntry, settings: StreamSettings, token: str | None) -> None:
        super().__init__(Path(name), Path())
        assert entry.hub is not None
        hub, self.repository = entry.hub
        if hub != "hf":
            raise UserError(f"data set {name!r}: only Hugging Face's data sets can be streamed; leave 'streaming' out to download this one")
        if "[" in entry.split:
            raise UserError(f"data set {name!r}: a part of a split ({entry.split!r}) cannot be streamed; leave 'streaming' out")
        if settings.num_rows is None:
            raise UserError(f"data set {name!r}: 'streaming' needs 'max_steps', since a stream does not say how many rows it has")
        self.name, self.entry, self.settings, self.token = name, entry, settings, token
        self._passes = _Passes(name, self.repository, entry, settings, token)
        self._rows: Iterator[Any] | None = None
        self._next = 0
        self._owner = 0  # the process that has opened it

    @classmethod
    def build(cls, path: Path, beside: Path) -> None:
        """Nothing is made of a stream."""

    def __len__(self) -> int:
        return self.settings.num_rows or 0

    def __getitem__(self, row: int) -> Any:
        if self._rows is None or row < self._next or self._owner != os.getpid():
            self._rows, self._next, self._owner = self._passes.read(row), row, os.getpid()
        try:
            while self._next < row:
                next(self._rows)
                self._next += 1
            self._next += 1
            return next(self._rows)
        except StopIteration:
            raise UserError(f"data set {self.name!r}: the stream of {self.repository} holds no rows") from None

    @property
    def content(self) -> str:
        """What stands for the content in the key of the cache: the repository as it is now, and how it is read."""
        from huggingface_hub import HfApi

        try:
            commit = HfApi(token=self.token).dataset_info(self.repository).sha
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"data set {self.name!r}: {self.repository} cannot be reached: {_plain(error)}") from None
        entry, settings = self.entry, self.settings
        return f"{self.repository}@{commit} {entry.subset} {entry.split} {entry.folder} {settings}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}


@dataclass(frozen=True)
class _Passes:
    """A stream from its start to its end, again and again.

    Apart from the table, so that reading that is given up ends there and then: were it in a cycle with the table, the
    collector would end it at any moment in any thread, and a library that waits for threads of its own may then wait for ever.
    """

    name: str
    repository: str
    entry: DatasetEntry
    settings: StreamSettings
    token: str | None

    def read(self, first: int) -> Iterator[Any]:
        """Rows from `first` on, pass after pass."""
        number = 0
        while True:
            found = 0
            for row in self._told(self._pass(number, first)):
                found += 1
                yield row
            if found:
                number, first = number + 1, 0
                continue
            size = sum(1 for _ in self._told(self._pass(number, 0))) if first else 0
            if not size:
                return
            number, first = number + first // size, first % size  # it lies in a later pass

    def _pass(self, number: int, first: int) -> IterableDataset:
        stream = self._open()
        if self.settings.shuffle:
            stream = stream.shuffle(seed=self.settings.seed, buffer_size=self.settings.buffer_size)
        if first:
            stream = stream.skip(first)
        stream.set_epoch(number)  # last: what is made of a stream begins with epoch 0
        return stream

    def _told(self, stream: IterableDataset) -> Iterator[Any]:
        try:
            yield from stream
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"data set {self.name!r}: the stream of {self.repository} broke off: {_plain(error)}") from None

    def _open(self) -> IterableDataset:
        import datasets

        entry = self.entry
        try:
            return datasets.load_dataset(
                self.repository, entry.subset, split=entry.split, data_dir=entry.folder, streaming=True, token=self.token
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:  # also the library's own, which derive from these
            raise UserError(f"data set {self.name!r}: {self.repository} cannot be streamed: {_plain(error)}") from None


def stream_table(name: str, entry: DatasetEntry, settings: StreamSettings, download: Mapping[str, Any]) -> StreamTable:
    """The stream of a hub data set; raises `UserError`."""
    token = download.get("tokens", {}).get("hf")
    return StreamTable(name, entry, settings, token)


def _plain(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
