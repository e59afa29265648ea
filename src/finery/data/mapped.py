"""Arrays in files that are looked at here and there, without keeping what was looked at in memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class MappedArray:
    """`size` items of a file, mapped when first asked for; written through where the file may be written.

    A process that is forked or gets it pickled maps it anew or shares the mapping; nothing but the path travels.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], size: int) -> None:
        self.path = path
        self.dtype = dtype
        self.size = size
        self._memory: mmap.mmap | None = None
        self._array: NDArray[Any] | None = None

    @property
    def array(self) -> NDArray[Any]:
        """The items, one-dimensional."""
        if self._array is None:
            self._array = self._map() if self.size else np.zeros(0, self.dtype)
        return self._array

    def let_go(self) -> None:
        """What was looked at no longer counts as this process's memory; every look maps some 64 kB."""
        if self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED)

    def _map(self) -> NDArray[Any]:
        writable = os.access(self.path, os.W_OK)
        with self.path.open("r+b" if writable else "rb") as file:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._memory = mmap.mmap(file.fileno(), self.size * self.dtype.itemsize, access=access)
        return np.frombuffer(self._memory, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_memory": None, "_array": None}
