"""From a page to a job: the keys are looked at, written into the run's folder, and given to a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finery.errors import UserError
from finery.jobs import Job, start
from finery.models.demo_model import demo_folder, demo_model
from finery.web.arguments import as_yaml, more_keys, to_keys
from finery.web.board import Board
from finery.web.saves import output_dir

_CHECK_SECONDS = 600
_ONE = threading.Lock()
_WRITES = {"output_dir", "export_dir"}


def gathered(board: Board, held: Mapping[str, Any], tab: str, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the run that a tab describes: its controls, what was typed beside them, and what the tab itself means.

    Raises `UserError` for what is missing, and for places outside of what the page may touch.
    """
    if board.is_demo:
        raise UserError("this page is a demonstration: it starts nothing")
    if not held["top.model_path"]:
        raise UserError("no model is chosen: choose one above, or type its folder or its name on the hub")
    _unpack(held["top.model_path"])
    keys = to_keys(held, tab)
    keys |= _checkpoints(held["top.checkpoint_path"] or [], held["top.finetuning_type"])
    keys |= fixed
    if "output_dir" in keys:
        keys["output_dir"] = output_dir(held, str(keys["output_dir"] or ""), board.roots)
    keys |= more_keys(held.get(f"{tab}.more") or "")
    board.roots.look_at(keys)
    for key in _WRITES & keys.keys():  # a link may lead out to what is not there yet
        board.roots.path(str(keys[key]), key)
    return keys


def _unpack(model: str) -> None:
    """The model that needs no hub is made when it is first asked for: opening the page waits for nothing."""
    if model == str(demo_folder()):
        with _ONE:
            demo_model()


def _checkpoints(chosen: list[str], finetuning_type: str) -> dict[str, Any]:
    from finery.models.adapters import ADAPTERS

    if not chosen:
        return {}
    return {"adapter_name_or_path": list(chosen)} if ADAPTERS[finetuning_type].takes_adapters else {"model_name_or_path": chosen[0]}


def start_run(board: Board, keys: Mapping[str, Any], verb: str) -> Job:
    """Start a run, or queue it; raises `UserError` for what `finery VERB` would complain of, and then there is no job.

    The job's own folder keeps the file that it was started with.
    """
    name = re.sub(r"[^\w.-]+", "-", f"{verb}-{Path(str(keys.get('output_dir') or keys.get('export_dir'))).name}")
    with _written(keys, f"{verb}.yaml") as path:
        return start([str(path)], board.roots.home, name, verb="export" if verb == "export" else "train")


def checked(board: Board, keys: Mapping[str, Any]) -> str:
    """What `finery check` finds, as it prints it: in a process of its own, since it may take memory and time."""
    with _written(keys, "check.yaml") as path:
        command = [sys.executable, "-P", "-m", "finery", "check", str(path)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, cwd=board.roots.home, timeout=_CHECK_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"the check has not ended in {_CHECK_SECONDS} s; 'finery check' in a shell takes as long as it needs") from None
    return (ran.stdout + ran.stderr).replace(f"{path.parent}/", "").strip()


@contextmanager
def _written(keys: Mapping[str, Any], name: str) -> Iterator[Path]:
    """A file of these keys that nobody else reads."""
    with tempfile.TemporaryDirectory(prefix="finery-") as folder:
        path = Path(folder) / name
        path.write_text(as_yaml(keys), encoding="utf-8")
        yield path
