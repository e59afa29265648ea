"""The keys and values of many answers in one batch: rows join and leave between tokens, and nothing is copied for the others.

All rows end at the same column, so that the next token of each is written to one column; what is before a row's first token is masked.
Shapes: R rows, H heads of keys and values, C columns, D width of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 128
"""So many columns more than are needed now are taken at a time."""


class RowLayer(DynamicLayer):
    """One layer's keys and values, (R, H, C, D); those beyond a sliding window are kept, and masked."""

    def __init__(self, window: Window, is_sliding: bool) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = is_sliding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns of all rows; the window moves when the whole model has done so."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window, (rows, heads, new, _) = self.window, key_states.shape
        self.reserve(rows, heads, window.end + new, key_states.shape[-1], value_states.shape[-1])
        columns, shown = slice(window.end, window.end + new), slice(window.start, window.end + new)
        self.keys[:rows, :, columns], self.values[:rows, :, columns] = key_states, value_states  # type: ignore[index]
        return self.keys[:rows, :, shown], self.values[:rows, :, shown]  # type: ignore[index]

    def reserve(self, rows: int, heads: int, columns: int, key_width: int, value_width: int) -> None:
        """Room for so many rows and columns."""
        for name, width in (("keys", key_width), ("values", value_width)):
            held: Tensor = getattr(self, name)
            if held.numel() and held.shape[0] >= rows and held.shape[2] >= columns:
                continue
            old = held if held.numel() else held.new_zeros(0, heads, 0, width)
            more = rows if rows <= old.shape[0] or not old.shape[0] else 2 * old.shape[0]
            new = old.new_zeros(max(rows, more, old.shape[0]), heads, max(columns + _ROOM, old.shape[2]), width)
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        """Columns that are there before the next token."""
        return self.window.end - self.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, from the first one."""
        return self.get_seq_length() + query_length, 0


class Window:
    """The columns that are in use, of all layers."""

    def __init__(self) -> None:
        self.start = self.end = 0


class RowCache(Cache):
    """A cache of rows of different lengths."""

    def __init__(self, config: Any) -> None:
        self.window = Window()
        plain: list[Any] = DynamicCache(config=config).layers
        self.held = [RowLayer(self.window, bool(layer.is_sliding)) for layer in plain]
        super().__init__(layers=list(self.held))
        self.config = config
        self.lengths: list[int] = []

    @staticmethod
    def serves(config: Any) -> bool:
        """Whether all layers of a model keep keys and values, and nothing else."""
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)

    def reserve(self, rows: int, num_new: int, heads: int, width: int) -> None:
        """Room in all layers for new fp32 columns, which a native function writes."""
        for layer in self.held:
            if not layer.is_initialized:
                layer.lazy_initialization(torch.empty(0), torch.empty(0))
            layer.reserve(rows, heads, self.window.end + num_new, width, width)

    def addresses(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the keys and the values of each layer and row begin, (layers, R) each."""
        rows = np.arange(len(self.lengths))
        stride = self.held[0].keys.stride(0) * self.held[0].keys.element_size()  # type: ignore[union-attr]
        keys, values = ([getattr(layer, name).data_ptr() for layer in self.held] for name in ("keys", "values"))
        return np.array(keys)[:, None] + rows * stride, np.array(values)[:, None] + rows * stride

    @property
    def head_stride(self) -> int:
        """How many numbers lie between a head's first and the next one's."""
        return self.held[0].keys.stride(1)  # type: ignore[union-attr]

    def advance(self, num_new: int = 1) -> None:
        """The whole model has written so many columns."""
        self.window.end += num_new
        self.lengths = [length + num_new for length in self.lengths]

    def mask(self, device: torch.device, num_new: int = 1) -> Tensor:
        """(R, columns in use and new ones), 1 where a row has a token."""
        size = self.window.end - self.window.start + num_new
        firsts = torch.tensor([size - num_new - length for length in self.lengths], device=device)
        return (torch.arange(size, device=device)[None] >= firsts[:, None]).long()

    def join(self, other: RowCache) -> None:
        """Take over the one row of another cache, as the last."""
        (length,) = other.lengths
        window, row = self.window, len(self.lengths)
        if not row:
            window.start = window.end = 0
        if window.end < length:  # it is longer than there are columns before the end
            self._shift(length - window.end)
        for mine, its in zip(self.held, other.held, strict=True):
            if not its.is_initialized:
                continue
            if not mine.is_initialized:
                mine.lazy_initialization(its.keys, its.values)  # type: ignore[arg-type]
            shown = slice(other.window.start, other.window.end)
            mine.reserve(row + 1, its.keys.shape[1], window.end, its.keys.shape[-1], its.values.shape[-1])  # type: ignore[attr-defined,union-attr]
            mine.keys[row, :, window.end - length : window.end] = its.keys[0, :, shown]  # type: ignore[index]
            mine.values[row, :, window.end - length : window.end] = its.values[0, :, shown]  # type: ignore[index]
        self.lengths.append(length)
        self._narrow()

    def _shift(self, columns: int) -> None:
        """Move everything to the right, to make room before it."""
        window = self.window
        for layer in self.held:
            if layer.is_initialized:
                rows, heads, _, width = layer.keys.shape  # type: ignore[union-attr]
                layer.reserve(rows, heads, window.end + columns, width, layer.values.shape[-1])  # type: ignore[attr-defined,union-attr]
                for held in (layer.keys, layer.values):
                    part = held[:, :, window.start : window.end].clone()  # type: ignore[index]
                    held[:, :, window.start + columns : window.end + columns] = part  # type: ignore[index]
        window.start += columns
        window.end += columns

    def leave(self, row: int) -> None:
        """Give up a row; the last one takes its place."""
        last = len(self.lengths) - 1
        window = self.window
        if row != last:
            for layer in self.held:
                if layer.is_initialized:
                    for held in (layer.keys, layer.values):
                        held[row, :, window.start : window.end] = held[last, :, window.start : window.end]  # type: ignore[index]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self._narrow()

    def _narrow(self) -> None:
        """Columns that no row uses any more are not looked at; where many are free, what is there moves left, so that few are held."""
        window = self.window
        window.start = window.end - max(self.lengths, default=0)
        if window.start <= _ROOM or window.start < window.end - window.start:
            return
        columns = window.start
        for layer in self.held:
            if layer.is_initialized:
                for held in (layer.keys, layer.values):
                    held[:, :, : window.end - columns] = held[:, :, columns : window.end].clone()  # type: ignore[index]
        window.start, window.end = 0, window.end - columns
