"""Runs on the tiny model to which something happens at a step."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finery.training import kept
from survived import Stage


@pytest.fixture
def stage(keys: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage(keys, tmp_path)
    done = kept._Marks.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        done(self, args, state, control, **more)
        if state.global_step in found.planned:
            found.planned.pop(state.global_step)()

    monkeypatch.setattr(kept._Marks, "on_step_end", on_step_end)
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the privilege to mount a small disk: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


_WHOLE: list[Path] = []


@pytest.fixture
def whole(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of six steps; made once, for all tests of this process, which only read it."""
    if not _WHOLE:
        _WHOLE.append(stage.train(output_dir=str(tmp_path_factory.mktemp("undisturbed") / "whole")))
    return _WHOLE[0]
