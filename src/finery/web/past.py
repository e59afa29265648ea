"""Runs that have been: the folders of this page's saves and of all jobs, each with its curve and its settings."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from finery.errors import UserError
from finery.jobs import jobs
from finery.models.trained import RUN_FILE
from finery.web.curves import Curve
from finery.web.roots import Roots
from finery.web.saves import SAVES
from finery.web.watching import folder_of, latest, log_lines, losses, smoothed, thinned

MOST_RUNS = 200
LOOKS = tuple(f"c{number}" for number in range(8))
_LOG = "trainer_log.jsonl"


@dataclass(frozen=True)
class Past:
    """A run's folder, as its files tell it."""

    name: str  # from the page's own folder where it lies in there
    folder: Path
    changed: float
    state: str

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Of its log, read when they are asked for: of most runs only the name is."""
        return log_lines(self.folder / _LOG)

    @property
    def row(self) -> list[Any]:
        """Its line in the table: when, name, state, steps, loss, evaluation loss."""
        last = latest(self.lines)
        steps = f"{last['current_steps']}/{last['total_steps']}" if last else ""
        told = [f"{last[name]:.4f}" if name in last else "" for name in ("loss", "eval_loss")]
        return [time.strftime("%Y-%m-%d %H:%M", time.localtime(self.changed)), self.name, self.state, steps, *told]


def past_runs(roots: Roots) -> list[Past]:
    """All of them, the newest first."""
    states: dict[Path, str] = {}
    for job in jobs():
        folder = folder_of(job)
        if folder is not None:
            states[folder.resolve()] = job.status().state
    found = {path.parent.resolve() for path in (roots.home / SAVES).glob(f"*/*/*/{_LOG}")}
    found |= {folder for folder in states if (folder / _LOG).is_file()}
    inside = [folder for folder in found if any(folder.is_relative_to(root) for root in roots.folders)]
    newest = sorted(inside, key=lambda folder: (folder / _LOG).stat().st_mtime, reverse=True)[:MOST_RUNS]
    return [_past(folder, states.get(folder, ""), roots) for folder in newest]


def _past(folder: Path, state: str, roots: Roots) -> Past:
    ended = "finished" if (folder / "all_results.json").exists() else ""
    return Past(roots.named(folder), folder, (folder / _LOG).stat().st_mtime, state or ended)


def overlaid(chosen: Sequence[Past]) -> list[Curve]:
    """The smoothed loss of each, in colours of their own."""
    return [Curve(run.name, thinned(smoothed(losses(run.lines))), look) for run, look in zip(chosen, LOOKS, strict=False)]


def settings_of(run: Past) -> dict[str, Any]:
    """What a run was, key by key; raises `UserError` where it has not told."""
    try:
        return yaml.safe_load((run.folder / RUN_FILE).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{run.name} has no readable {RUN_FILE}: {error}") from None


def differing(one: Past, other: Past) -> list[list[str]]:
    """The keys whose values two runs have not in common: key, the one's, the other's."""
    ours, theirs = settings_of(one), settings_of(other)
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return [[key, _told(ours.get(key)), _told(theirs.get(key))] for key in keys if ours.get(key) != theirs.get(key)]


def _told(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
