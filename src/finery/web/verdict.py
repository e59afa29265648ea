"""What the proof says of the template that would be taken: a line beside it, before anything is started."""

from __future__ import annotations

import html
import threading
from functools import lru_cache
from pathlib import Path

from finery.checks.template import Templates
from finery.errors import UserError
from finery.run import Run
from finery.web.roots import Roots
from finery.web.texts import Texts

_ONE = threading.Lock()  # tokenizers are loaded by one look at a time
_MOST_TOLD = 3


def verdict(roots: Roots, model: str, template: str | None, spoken: Texts) -> str:
    """HTML; of a model that is not on this machine nothing is known yet, and nothing is fetched for it."""
    if not model:
        return ""
    try:
        folder = roots.path(model, "model_name_or_path")
    except UserError as error:
        return _line("bad", str(error))
    if not (folder / "tokenizer_config.json").is_file():
        return _line("", spoken.say("verdict_later"))
    name = None if template in (None, "", "auto") else template
    with _ONE:
        told, faults = _proved(str(folder), name, (folder / "tokenizer_config.json").stat().st_mtime)
    if faults:
        return "".join(_line("bad", fault) for fault in faults[:_MOST_TOLD])
    return _line("good", spoken.say("verdict_good", told=told))


@lru_cache(maxsize=64)
def _proved(model: str, template: str | None, changed: float) -> tuple[str, tuple[str, ...]]:
    """What was proved, and what is wrong; `changed` is of the tokenizer's file, so that another one is looked at anew."""
    del changed
    try:
        run = Run.from_dict({"model_name_or_path": model, **({"template": template} if template else {})})
    except UserError as error:
        return "", tuple(map(str, error.complaints))
    check = Templates()
    found = [str(finding) for finding in check.findings(run)]
    return "; ".join(f"{one.name}: {one.num_used}/{one.num_rows}" for one in check.checked), tuple(found)


def _line(look: str, text: str) -> str:
    return f'<p class="proof {look}">{html.escape(text.replace(f"{Path.home()}/", "~/"))}</p>'
