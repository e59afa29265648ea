"""The report of an export as HTML: whether it is what was trained, measure by measure."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finery.errors import UserError
from finery.web.answered import columns
from finery.web.differences import marked
from finery.web.sheet import sheet
from finery.web.texts import Texts

REPORT = "parity.json"
Told = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """One line; `holds` is nothing where no limit is set."""

    name: str  # of its text
    value: str
    limit: str = ""
    holds: bool | None = None


def read_report(path: Path) -> dict[str, Any]:
    """What an export says of itself; raises `UserError`."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(told["verified"], bool):
            raise TypeError
        return dict(told)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no report of an export") from None


def report_page(folder: Path, told: Told, spoken: Texts) -> str:
    """All of it. Raises `UserError` for a report that lacks something."""
    try:
        parts = [_verdict(told, spoken), _list("fault", told.get("faults", ())), _list("warning", told.get("notes", ()))]
        if told["verified"]:
            parts += [_table(list(measures(told, spoken)), spoken), *(_texts(text, spoken) for text in told["texts"])]
        parts.append(_files(folder, told.get("files", ()), spoken))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{folder / REPORT} lacks what a report has") from None
    return "".join(parts)


def _verdict(told: Told, spoken: Texts) -> str:
    word = "parity_unverified" if not told["verified"] else "parity_passed" if told["passed"] else "parity_failed"
    said = spoken.say(word, form=told["form"])
    return f'<p class="verdict {word}" role="status">{html.escape(said)}</p>'


def _list(kind: str, lines: Any) -> str:
    return "".join(f'<p class="{kind}">{html.escape(str(line))}</p>' for line in lines)


def measures(told: Told, spoken: Texts) -> Iterator[Measure]:
    """What was compared, with the limits that this form has."""
    limits, total = told["limits"], told["num_probes"]
    yield Measure("parity_tokens", f"{told['ids_equal']} / {total}", f"{total}", told["ids_equal"] == total)
    if own := told["distance"]:
        yield _at_most("parity_mean_kl", own["mean_kl"], limits["mean_kl"], spoken)
        yield Measure("parity_max_kl", f"{own['max_kl']:.2e}")
        yield Measure("parity_logits", f"{own['mean_delta']:.2e}, {own['max_delta']:.2e}")
        yield Measure("parity_next", f"{own['same_next']:.1%} / {own['num_places']}")
    if told["exact"] and limits["exact"]:
        yield _at_most("parity_exact", told["exact"]["mean_kl"], limits["exact"], spoken)
    if told["moved"]:
        yield Measure("parity_moved", f"{told['moved']['mean_kl']:.2e}")
    if told["effect"] is not None:
        low, high = limits["effect"] or (None, None)
        if low is None:
            yield Measure("parity_effect", f"{told['effect']:.1%}")
        else:
            yield Measure("parity_effect", f"{told['effect']:.1%}", f"{low:.0%} – {high:.0%}", low <= told["effect"] <= high)
    if told["as_trained"]:
        yield Measure("parity_few_bits", f"{told['as_trained']['mean_kl']:.2e}")
    same = sum(text["trained"] == text["exported"] for text in told["texts"])
    yield Measure("parity_written", f"{same} / {len(told['texts'])}")


def _at_most(name: str, value: float, limit: float, spoken: Texts) -> Measure:
    return Measure(name, f"{value:.2e}", spoken.say("parity_at_most", limit=f"{limit:.0e}"), value <= limit)


def _table(lines: list[Measure], spoken: Texts) -> str:
    titles = [spoken.say(name) for name in ("measure", "measured", "parity_limit", "parity_verdict")]
    rows = [(spoken.say(line.name), line.value, line.limit, _word(line, spoken)) for line in lines]
    return sheet(titles, rows, [_look(line) for line in lines])


def _look(line: Measure) -> str:
    return {True: "holds", False: "broken", None: "aside"}[line.holds]


def _word(line: Measure, spoken: Texts) -> str:
    return "" if line.holds is None else spoken.say("parity_holds" if line.holds else "parity_broken")


def _texts(text: Told, spoken: Texts) -> str:
    both = zip((spoken.say("parity_trained"), spoken.say("parity_exported")), marked(text["trained"], text["exported"]), strict=True)
    return f'<article class="beside"><h4>{html.escape(text["prompt"])}</h4><div>{columns(list(both))}</div></article>'


def _files(folder: Path, names: Any, spoken: Texts) -> str:
    there = [(str(name), folder / str(name)) for name in names if Path(str(name)).name == name]
    told = [f"{name} ({_size(path.stat().st_size)})" for name, path in there if path.is_file()]
    return f'<p class="legend">{html.escape(spoken.say("parity_files", folder=folder, files=", ".join(told)))}</p>' if told else ""


def _size(num_bytes: int) -> str:
    power, unit = next(((power, unit) for power, unit in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= power), (1e3, "kB"))
    return f"{num_bytes / power:,.1f} {unit}"
