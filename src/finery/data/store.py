"""The tokens of one data set on disk: shards that only grow, and an index with an entry for each record.

An entry is written after the bytes that it points to, and carries their hash: whatever ends the process that writes,
what the index names can be read, and the next run goes on from there.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from finery import compat
from finery.data.content import full_disk
from finery.data.mapped import MappedArray
from finery.data.rows.base import IGNORED, Encoded, Row
from finery.errors import UserError
from finery.files import digest

ENTRY = np.dtype(
    [
        ("offset", "<i8"),  # in the shard, in bytes
        ("hash", "<u8"),  # xxh3 of the bytes and of `num_rows`, without which they cannot be read
        ("shard", "<i4"),
        ("size", "<i4"),  # in 4-byte words
        ("num_ids", "<i4"),  # tokens of all rows together
        ("num_supervised", "<i4"),
        ("num_cut", "<i4"),
        ("num_rows", "<i4"),
        ("cut", "u1"),
        ("present", "u1"),  # written last
    ]
)
SHARD_BYTES = 1 << 24
"""A shard is followed by the next when it is larger. Small ones keep little of them mapped at a time."""
_MOST_MAPPED = 4
_NONE = np.zeros(0, np.int32)
_PADDING = (b"", b"\0", b"\0\0", b"\0\0\0")
_PIECE = 1 << 16


@cache
def code_version() -> str:
    """A digest of the code that shapes tokens: another version of it never takes what this one has encoded."""
    files = [path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".yaml")]  # a list of some would miss the next one
    versions = [f"{name} {version(name)}" for name in ("jinja2", "tokenizers", "transformers")]
    return digest(*sorted([*files, Path(compat.__file__)]), *versions)


class TokenStore:
    """Rows of tokens by record; reading never blocks, absent records are simply not there yet."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self._index = MappedArray(folder / "index.bin", ENTRY, size)
        self._maps: OrderedDict[int, NDArray[np.int32]] = OrderedDict()

    @classmethod
    def create(cls, folder: Path, size: int, key: Mapping[str, Any]) -> TokenStore:
        """Open a store, with an empty index where there is none; `key` is kept beside it, to be read by people."""
        index = folder / "index.bin"
        folder.mkdir(parents=True, exist_ok=True)
        if not index.exists() or index.stat().st_size != size * ENTRY.itemsize:
            (folder / "key.json").write_text(json.dumps({"size": size, **key}, ensure_ascii=False, indent=1), encoding="utf-8")
            try:
                with index.open("wb") as file:
                    for start in range(0, size, _PIECE):  # written, and not a hole, whose filling on a full disk would end a process
                        file.write(bytes(min(_PIECE, size - start) * ENTRY.itemsize))
            except OSError as error:
                raise full_disk(error) or error from None
        return cls(folder, size)

    @property
    def entries(self) -> NDArray[Any]:
        """The index, mapped into memory."""
        return self._index.array

    def let_go(self) -> None:
        """What was looked at of the index no longer counts as this process's memory."""
        self._index.let_go()

    def has(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which records are encoded."""
        return self.entries["present"][rows] == 1

    def read(self, record: int) -> list[Row] | None:
        """The rows of a record, perhaps none; nothing where it is not encoded, or what is there is damaged."""
        entry = self.entries[record]
        if not entry["present"]:
            return None
        words = self._words(entry)
        if words is None:
            return None
        return _rows(words, int(entry["num_rows"]))

    def reason(self, record: int) -> str:
        """Why an encoded record has no rows."""
        words = self._words(self.entries[record])
        return "" if words is None else words.tobytes().rstrip(b"\0").decode()

    def _words(self, entry: Any) -> NDArray[np.int32] | None:
        shard, start, size = int(entry["shard"]), int(entry["offset"]) // 4, int(entry["size"])
        mapped = self._maps.get(shard)
        if mapped is None or len(mapped) < start + size:
            try:
                path = self.shard(shard)  # it may end within a word where the disk was full
                mapped = np.memmap(path, "<i4", "r", shape=(path.stat().st_size // 4,))
            except (OSError, ValueError):
                return None
            self._maps[shard] = mapped
            if len(self._maps) > _MOST_MAPPED:
                self._maps.popitem(last=False)
        self._maps.move_to_end(shard)
        words = np.array(mapped[start : start + size])
        return words if _hash(words.tobytes(), int(entry["num_rows"])) == int(entry["hash"]) else None

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard-{number:05d}.bin"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}


class StoreWriter:
    """Appends to a store, in shards of its own, so that several processes may write at once."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store
        self._descriptor = -1
        self._number = -1
        self._size = 0

    def put(self, records: Sequence[int], encoded: Sequence[Encoded]) -> None:
        """Write what records became; raises `OSError` where the disk is full, and then has changed nothing that is read."""
        if self._descriptor < 0 or self._size > SHARD_BYTES:
            self._next_shard()
        entries, pieces, offset = np.zeros(len(records), ENTRY), [], self._size
        for place, (one, words) in enumerate(zip(encoded, _to_words(encoded), strict=True)):
            ids = sum(len(row.ids) for row in one.rows)
            hashed = _hash(words, len(one.rows))
            facts = (ids, one.num_supervised, one.num_cut, len(one.rows), int(one.cut), 0)
            entries[place] = (offset, hashed, self._number, len(words) // 4, *facts)
            pieces.append(words)
            offset += len(words)
        _write_all(self._descriptor, b"".join(pieces))
        self._size = offset
        where = np.asarray(records, np.int64)
        self.store.entries[where] = entries
        self.store.entries["present"][where] = 1
        self.store.let_go()

    def _next_shard(self) -> None:
        self.close()
        while True:
            self._number += 1
            try:
                self._descriptor = os.open(self.store.shard(self._number), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            except FileExistsError:
                continue
            self._size = 0
            return

    def close(self) -> None:
        """Close the shard."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _hash(words: bytes, num_rows: int) -> int:
    return xxhash.xxh3_64_intdigest(words, seed=num_rows)


def _write_all(descriptor: int, data: bytes) -> None:
    """All of it or an error: a disk that fills up takes a part without a word."""
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[written:]


def _to_words(encoded: Sequence[Encoded]) -> Iterator[bytes]:
    """For each: lengths of the rows and of their odd labels, then for each row ids, a bit for each learnt token, and odd labels with
    their places. What can be told of all rows together is told so, which costs less."""
    rows = [row for one in encoded for row in one.rows]
    labels = np.concatenate([row.labels for row in rows]) if rows else np.zeros(0, np.int32)
    ids = np.concatenate([row.ids for row in rows]) if rows else labels
    learnt = labels != IGNORED
    with_odd = bool((learnt & (labels != ids)).any())
    end = 0
    for one in encoded:
        head, pieces = [], [b""]
        for row in one.rows:
            start, end = end, end + len(row.ids)
            odd = np.flatnonzero(learnt[start:end] & (row.labels != row.ids)).astype(np.int32) if with_odd else _NONE
            bits = np.packbits(learnt[start:end]).tobytes()
            head += [len(row.ids), len(odd)]
            pieces += [row.ids.tobytes(), bits, _PADDING[-len(bits) % 4]]
            if len(odd):
                pieces += [odd.tobytes(), row.labels[odd].tobytes()]
        pieces[0] = struct.pack(f"<{len(head)}i", *head)
        reason = b"" if head else one.reason.encode(errors="replace")
        yield b"".join(pieces) if head else reason + _PADDING[-len(reason) % 4]


def _rows(words: NDArray[np.int32], num_rows: int) -> list[Row]:
    rows, at = [], 2 * num_rows
    for number in range(num_rows):
        size, num_odd = int(words[2 * number]), int(words[2 * number + 1])
        ids = words[at : at + size]
        at += size
        num_bits = -(-size // 32)
        learnt = np.unpackbits(words[at : at + num_bits].view(np.uint8), count=size).astype(bool)
        at += num_bits
        labels = np.where(learnt, ids, np.int32(IGNORED))
        if num_odd:
            labels[words[at : at + num_odd]] = words[at + num_odd : at + 2 * num_odd]
        at += 2 * num_odd
        rows.append(Row(ids, labels))
    return rows


_DIGESTS = ("files", "tokenizer and template", "versions of Finery")
"""Parts of a key that say nothing to people but whether they are the same."""


def _difference(name: str, was: Any, now: Any) -> str:
    return f"{name} differ" if name in _DIGESTS else f"{name} was {json.dumps(was)[:80]}, is {json.dumps(now)[:80]}"


def check_key(folder: Path, key: Mapping[str, Any], size: int) -> None:
    """Raise `UserError` that names what differs where a store of another key lies in `folder`."""
    path = folder / "key.json"
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"'tokenized_path': {path} cannot be read. Name another folder, or delete this one") from None
    wanted = json.loads(json.dumps({"size": size, **key}))
    names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if names:
        told = "; ".join(_difference(name, found.get(name), wanted.get(name)) for name in names)
        raise UserError(f"'tokenized_path': {folder} was written with other settings: {told}. Name another folder, or delete this one")
