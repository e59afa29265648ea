"""The Data tab without a browser: what its parts hold, before and after something was asked of it."""

import json
import os
from pathlib import Path
from typing import Any

from finery.data.registry import FILE
from finery.web.board import Board
from finery.web.pages import data as page

Held = dict[str, Any]
EVIL = "<img src=x onerror='window.hit=1'>"


def registry(home: Path, entries: Any, name: str = "data", indent: int = 2) -> Path:
    (home / name).mkdir(exist_ok=True)
    path = home / name / FILE
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries, indent=indent), encoding="utf-8")
    return path


def records(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def held_of(updates: Held, before: Held | None = None) -> Held:
    """What the page's parts hold after a reaction, as the browser sends it with the next."""
    held = {"data.dataset_dir": "data", "data.sent": None, "data.read": None, "data.clicked": None, **(before or {})}
    held |= {id: "" for id in page.FORM if id not in held}
    for id, update in updates.items():
        if not (isinstance(update, dict) and "__type__" in update):
            held[id] = update
        elif "value" in update:
            held[id] = update["value"]
    return held


def chosen(board: Board, name: str) -> Held:
    return held_of(page.choose(board, held_of({"data.clicked": (name, "", 0.0)})))


def sent(board: Board, name: str, *rows: Any) -> Held:
    """A file comes, as Gradio hands it over."""
    path = records(Path(os.environ["GRADIO_TEMP_DIR"]) / "ab12" / name, *rows)
    return held_of(page.receive(board, held_of({"data.upload": str(path)})), held_of({}))


QA = {"instruction": "Who?", "input": "", "output": "Me."}
