"""Finery fine-tunes open-source language models: one YAML file, one command line."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["chat", "export", "train"]


def train(keys: dict[str, Any]) -> Path:
    """Train as `finery train` would with these keys; returns the output folder.

    Raises `finery.errors.UserError` for what the caller can mend.
    """
    from finery.commands.train import train as work
    from finery.run import Run

    return work(Run.from_dict(keys, trains=True))


def chat(keys: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """Answer `messages` (`[{"role": "user", "content": "Hi"}]`) with the model that these keys name."""
    from finery.commands.chat import answer
    from finery.run import Run

    return answer(Run.from_dict(keys), messages)


def export(keys: dict[str, Any]) -> Path:
    """Merge and save as `finery export` would with these keys; returns the exported folder."""
    from finery.commands.export import export as work
    from finery.run import Run

    return work(Run.from_dict(keys))
