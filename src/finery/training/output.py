"""What a run leaves in its folder beside the weights: run.yaml, the model card, the results."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finery import __version__
from finery.files import replace_text
from finery.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Line:
    """A key, the value that counted, and where it comes from."""

    key: str
    value: Any
    origin: str


SIGNATURE = "the resolved settings of this run, and where each comes from"
"""A part of every run.yaml of ours."""


CARD_MARK = "- finery\n"
"""A line of every model card of ours."""


def keep_foreign(path: Path, mark: str) -> None:
    """Put a file that no run has written (one without `mark`) aside, as <name>.given.<ending>."""
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        path.replace(other := path.with_stem(f"{path.stem}.given"))
        log.warning("%s was not written by a run: it is kept as %s", path, other)


def write_run_file(path: Path, lines: Iterable[Line]) -> None:
    """The resolved config as YAML that trains the same run again, each value with its origin. Secrets are left out."""
    texts = [f"# Finery {__version__}: {SIGNATURE}"]
    for line in lines:
        if is_secret(line.key) and line.value is not None:
            texts.append(f"# {line.key}: given, not written down  # {line.origin}")
        else:
            texts.append(f"{line.key}: {json.dumps(line.value, ensure_ascii=False)}  # {line.origin}")
    replace_text(path, "\n".join([*texts, ""]))


def is_secret(key: str) -> bool:
    """Whether a key holds what nobody should read in a saved file."""
    return key.endswith(("token", "api_key", "secret", "webhook_url")) and not key.startswith(("skip_", "ignore_"))


def write_card(path: Path, base: str, method: str, adapter: str, data: Iterable[str], metrics: Mapping[str, Any]) -> None:
    """A model card: what was trained on what, with which result."""
    names = list(data)
    listed = "".join(f"\n- {name}" for name in names)
    front = ["---", "license: other", f"base_model: {base}", "tags:", "- finery", f"- {method}", f"- {adapter}", "---"]
    measured = [f"| {name} | {value:.4g} |" for name, value in metrics.items() if isinstance(value, (int, float))]
    text = f"""
# {path.parent.name}

{base} trained by [Finery](https://pypi.org/project/finery/) {__version__} with `stage: {method}`, `finetuning_type: {adapter}` on:
{listed or " nothing"}

The settings, each with its origin, are in `run.yaml`; the course of the loss is in `trainer_log.jsonl`.

| measure | value |
|---|---|
"""
    path.write_text("\n".join(front) + "\n" + text + "\n".join([*measured, ""]), encoding="utf-8")
