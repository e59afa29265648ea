"""Optional packages, and what differs between versions of the needed ones."""

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from finery.errors import UserError

EXTRA_OF = {"modelscope": "modelscope"}
"""Which extra of ours brings an optional package."""


def have(module: str) -> bool:
    """Whether an optional package is installed; it is not imported."""
    return find_spec(module) is not None


def need(module: str, why: str = "") -> ModuleType:
    """Import an optional package, or raise a `UserError` that says how to get it."""
    if not have(module):
        extra = EXTRA_OF.get(module)
        install = f'pip install "finery[{extra}]"' if extra else f"pip install {module}"
        raise UserError(f"the package {module!r} is not installed{f' ({why})' if why else ''}; it comes with: {install}")
    return import_module(module)


def is_on(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable of the environment is `1`, `true` or `y`."""
    return environment.get(name, "").lower() in ("1", "true", "y")


def is_first() -> bool:
    """Whether this is the only process of a run, or the first: it alone writes files."""
    return os.environ.get("RANK", "0") == "0"


def quiet_transformers() -> None:
    """No bars for what takes a second, no advice that concerns the libraries and not the user."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    # peft 0.21 still asks transformers 5.23 by the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
