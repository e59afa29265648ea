"""A user's own metric: a function in a file of theirs, found before anything takes long."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from finery.errors import UserError

KEY = "predict_metric"
Metric = Callable[[Sequence[str], Sequence[str]], dict[str, float]]
"""From answers and labels to numbers by name."""


def load_metric(named: str | None) -> Metric | None:
    """The function that `module:function` names, looked for in the working directory first; raises `UserError` where it is not there."""
    if named is None:
        return None
    module, _, name = named.partition(":")
    here = os.fspath(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = vars(import_module(module)).get(name)
    except Exception as error:  # whatever a user's file does
        raise UserError(f"{KEY!r}: {module} cannot be imported: {_told(error)}") from None
    if not callable(function):
        raise UserError(f"{KEY!r}: {module} has no function {name!r}")
    return lambda answers, labels: _called(named, function, answers, labels)


def _called(named: str, function: Callable[..., Any], answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    try:
        found = function(list(answers), list(labels))
    except Exception as error:
        raise UserError(f"{KEY!r}: {named} failed: {_told(error)}") from None
    if not isinstance(found, Mapping) or not all(_is_number(value) for value in found.values()):
        raise UserError(f"{KEY!r}: {named} should return numbers by name, found {str(found)[:60]!r}")
    return {str(key): float(value) for key, value in found.items()}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)


def _told(error: Exception) -> str:
    """The error, and the line of the user's file that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
