"""Data sets as HTML: their list, their first samples, and what a check has found. All that comes from data is shown as text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finery.web.catalogue import Listed
from finery.web.texts import Texts

_LEARNT = ("assistant", "function", "chosen", "thought", "said")
_MOST_FINDINGS = 50


def text(value: Any) -> str:
    """Safe to stand in HTML, attributes too; characters that are none are replaced."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def table(sets: Sequence[Listed], rows: Mapping[str, int], loose: Sequence[str], spoken: Texts) -> str:
    """The list of a folder's data sets; a name is a button."""
    head = "".join(f"<th>{text(spoken.say('data_col_' + name))}</th>" for name in ("name", "place", "format", "columns", "rows"))
    lines = "".join(_line(one, rows.get(one.name)) for one in sets)
    found = f'<div class="sets" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>' if sets else ""
    found = found or f"<p>{text(spoken.say('data_no_sets'))}</p>"
    buttons = " ".join(f'<button type="button" data-file="{text(file)}">{text(file)}</button>' for file in loose)
    return found + (f'<p class="loose">{text(spoken.say("data_loose_files"))} {buttons}</p>' if loose else "")


def _line(one: Listed, rows: int | None) -> str:
    name = f'<th scope="row"><button type="button" data-set="{text(one.name)}">{text(one.name)}</button></th>'
    if one.trouble:
        return f'<tr>{name}<td colspan="4" class="trouble">{text(one.trouble)}</td></tr>'
    cells = "".join(f"<td>{text(value)}</td>" for value in (one.place, one.formatting, one.columns))
    return f'<tr>{name}{cells}<td class="number">{"" if rows is None else f"{rows:,}"}</td></tr>'


def samples(found: Mapping[str, Any], spoken: Texts) -> str:
    """The first samples, each text in the colour of its role."""
    return "".join(_article(one["place"], one["parts"], spoken) for one in found["samples"])


def _article(place: str, parts: Iterable[tuple[str, str]], spoken: Texts) -> str:
    body = "".join(_part(role, said, spoken) for role, said in parts)
    return f'<article class="sample"><h4>{text(place)}</h4><dl>{body}</dl></article>'


def _part(role: str, said: str, spoken: Texts) -> str:
    kind = f"{role} learnt" if role in _LEARNT else role
    return f'<dt>{text(spoken.say(f"data_role_{role}"))}</dt><dd class="{text(kind)}"><pre dir="auto">{text(said)}</pre></dd>'


def findings(found: Mapping[str, Any], spoken: Texts) -> str:
    """What a check says, what would stop a run first."""
    if found["complaint"]:
        return f'<div class="warning">{text(found["complaint"])}</div>'
    every = sorted(found["findings"], key=lambda one: ("stops the run", "left out", "kept").index(one["effect"]))
    head = "; ".join(found["checked"])
    if not every:
        return f'<p class="clean">{text(spoken.say("data_clean"))} {text(head)}</p>'
    lines = "".join(_finding(one, spoken) for one in every[:_MOST_FINDINGS])
    more = len(every) - _MOST_FINDINGS
    rest = f"<li>{text(spoken.say('data_more_findings', number=more))}</li>" if more > 0 else ""
    return f'<p>{text(spoken.say("data_num_findings", number=len(every)))} {text(head)}</p><ul class="findings">{lines}{rest}</ul>'


def _finding(one: Mapping[str, Any], spoken: Texts) -> str:
    effect = {"stops the run": "effect_stops", "left out": "effect_left_out", "kept": "effect_kept"}[one["effect"]]
    rows = spoken.say("data_num_rows", number=f"{one['num_rows']:,}") if one["num_rows"] else ""
    about = " · ".join(filter(None, (spoken.say(f"data_{effect}"), rows)))
    return f'<li class="{effect}"><b>{text(about)}</b> {text(one["said"])}</li>'
