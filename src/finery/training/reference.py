"""The model that training began with, for losses that hold the trained one to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from finery.data.rows.base import Row
from finery.models.head import Scores
from finery.models.kernels.base import in_mode
from finery.training.lanes import Lanes
from finery.training.steps import Parts


class StartModel:
    """What is trained is kept as it was, and put back in place for a measurement; what is frozen is there anyway.

    So an adapter costs a copy of the adapter, full training a copy of the model, and all that makes the trained model fast serves here,
    too. It is built before a checkpoint is loaded: a resumed run is held to the same start.
    """

    def __init__(self, model: nn.Module, measure: Callable[[Sequence[Row]], Scores]) -> None:
        self._model = model
        self._measure = measure
        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        self._kept = [weight.detach().clone() for weight in self._trained]
        self._scores: dict[int, Scores] = {}

    def prepare(self, lanes: Sequence[Parts], threads: Lanes) -> None:
        """Where several threads share the weights, the whole step is measured before any of them goes on."""
        self._scores.clear()
        if len(lanes) > 1:
            with self._in_place():
                found = threads.run(lanes, lambda part, _: self._measure(part))
            parts = [part for lane in lanes for part in lane]
            self._scores = {id(part): scores for part, scores in zip(parts, found, strict=True)}

    def scores(self, part: Sequence[Row]) -> Scores:
        """What the model gave to the supervised tokens of a micro-batch."""
        if id(part) in self._scores:
            return self._scores.pop(id(part))
        with self._in_place():
            return self._measure(part)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        with in_mode(self._model, training=False), torch.no_grad():
            self._swap()
            try:
                yield
            finally:
                self._swap()

    def _swap(self) -> None:
        for weight, kept in zip(self._trained, self._kept, strict=True):
            weight.data, kept.data = kept.data, weight.data


def reference_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model is asked with for its scores alone."""
    return {name: value for name, value in batch.items() if name != "labels"} | {"targets": batch["labels"], "scores_only": True}
