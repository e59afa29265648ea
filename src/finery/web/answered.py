"""The result of an evaluation as HTML: its scores, and answers beside what the data have."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from finery.errors import UserError
from finery.web.differences import marked
from finery.web.roots import Roots
from finery.web.sheet import sheet
from finery.web.texts import Texts

SCORES = ("all_results.json", "predict_results.json", "eval_results.json")
"""The first that is there holds the others as well."""
ANSWERS = "generated_predictions*.jsonl"
PER_PAGE = 5
_TIMES = ("runtime", "per_second", "preparation_time", "samples", "epoch", "flos")
"""Ends of names that tell of the run, not of the model."""


def scores(roots: Roots, folder: Path) -> dict[str, Any]:
    """What was measured, by its name in the file; nothing where no file tells."""
    for name in SCORES:
        path = roots.path(str(folder / name), "result_of")
        if path.is_file():
            try:
                told = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise UserError(f"{path} cannot be read") from None
            return told if isinstance(told, dict) else {}
    return {}


def scores_table(told: Mapping[str, Any], spoken: Texts) -> str:
    """Scores first, then what the run took."""
    if not told:
        return ""
    aside = {name: name.endswith(_TIMES) for name in told}
    names = sorted(told, key=lambda name: (aside[name], name))
    looks = ["aside" if aside[name] else "score" for name in names]
    return sheet([spoken.say("measure"), spoken.say("measured")], [(name, _number(told[name])) for name in names], looks)


def _number(value: Any) -> str:
    return f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, (int, float)) else str(value)


def answer_files(folder: Path) -> list[str]:
    """A file for each set that was answered."""
    return sorted(path.name for path in folder.glob(ANSWERS) if path.is_file())


def answers_page(path: Path, page: int, spoken: Texts) -> tuple[str, int]:
    """One page of a file of answers as HTML, and its number: the last one where there are fewer."""
    with path.open("rb") as file:
        total = sum(1 for _ in file)
        num_pages = max(-(-total // PER_PAGE), 1)
        page = min(max(page, 0), num_pages - 1)
        file.seek(0)
        lines = list(islice(file, page * PER_PAGE, (page + 1) * PER_PAGE))
    told = [(number, _answer(line)) for number, line in enumerate(lines, page * PER_PAGE)]
    legend = spoken.say("answers_legend", total=f"{total:,}", page=f"{page:,}", last=f"{num_pages - 1:,}")
    articles = "".join(_article(number, *answer, spoken) for number, answer in told if answer is not None)
    return f'<p class="legend">{html.escape(legend)}</p>{articles}', page


def _answer(line: bytes) -> tuple[str, str, str] | None:
    """Prompt, answer and label; nothing where a line is not one, or not yet."""
    try:
        told = json.loads(line)
        return str(told["prompt"]), str(told["predict"]), str(told["label"])
    except (ValueError, KeyError, TypeError):
        return None


def _article(number: int, prompt: str, answer: str, label: str, spoken: Texts) -> str:
    same = answer.strip() == label.strip()
    verdict = f'<span class="same">{html.escape(spoken.say("answers_same"))}</span>' if same else ""
    titles = [spoken.say(name) for name in ("answers_prompt", "answers_answer", "answers_label")]
    cells = list(zip(titles, (html.escape(prompt), *marked(answer, label)), strict=True))
    return f'<article class="beside"><h4>{number + 1} {verdict}</h4><div>{columns(cells)}</div></article>'


def columns(cells: Sequence[tuple[str, str]]) -> str:
    """Texts beside each other, each under its title; `cells` are titles and HTML."""
    return "".join(f'<section><h5>{html.escape(title)}</h5><pre tabindex="0">{body}</pre></section>' for title, body in cells)
