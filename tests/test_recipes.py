"""The recipes of docs/architecture.md, followed to the letter in a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finery

ROOT = Path(__file__).parents[1]
FILE = re.compile(r"`src/(finery/[\w/]+\.(?:py|yaml))`.*?```(?:python|yaml)\n(.*?)```", re.S)


def test_each_new_part_is_one_file(tmp_path: Path, keys: Callable[..., dict[str, Any]]) -> None:
    shutil.copytree(Path(finery.__file__).parent, tmp_path / "finery")
    recipes = FILE.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert [Path(name).stem for name, _ in recipes] == ["mine", "lines", "focused"]
    for name, text in recipes:
        (tmp_path / name).write_text(text, encoding="utf-8")
    data = tmp_path / "data"
    data.mkdir()
    (data / "pairs.txt").write_text("".join(f"number {n}\tthe next is {n + 1}\n" for n in range(8)) + "no tab here\n")
    (data / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "pairs.txt", "formatting": "lines"}}))
    losses = []
    for focus in (0, 2):
        folder = tmp_path / f"out{focus}"
        given = keys(stage="focused", focus=focus, template="mine", dataset="pairs", dataset_dir=str(data), output_dir=str(folder))
        words = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "finery", "train", *words]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
        assert "train: pairs: 1 left out: a line should hold a question, a tab and an answer (pairs.txt row 8)" in result.stderr
        losses.append(json.loads((folder / "train_results.json").read_text())["train_loss"])
        assert "You are brief." in (folder / "chat_template.jinja").read_text()
    assert losses[1] < losses[0]
