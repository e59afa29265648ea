"""Rows as one self-contained web page that a phone can show."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from finery.errors import UserError
from finery.previews.rows import Preview, Shown
from finery.previews.terminal import pieces, title

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --quiet: #6e7781; --learnt: #116329; --ground: #dafbe1;
  --mark: #8250df; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --quiet: #8b949e; --learnt: #7ee787; --ground: #12361f; --mark: #d2a8ff; }
}
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.3rem; } h2 { font-size: .95rem; margin: 0 0 .4rem; font-weight: 600; }
article { border: 1px solid color-mix(in srgb, var(--quiet) 40%, transparent); border-radius: .6rem; padding: .8rem; margin: 1rem 0; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .9rem/1.55 ui-monospace, monospace; }
.read { color: var(--quiet); } .learnt { color: var(--learnt); background: var(--ground); border-radius: .2rem; }
.mark { color: var(--mark); font-weight: 600; }
.border { display: block; color: var(--mark); border-top: 2px dashed var(--mark); margin-top: .5rem; font-size: .8rem; }
"""


def write(preview: Preview, shown: Iterable[Shown], path: Path) -> int:
    """Write the page; returns how many samples it shows. Raises `UserError` where it cannot be written."""
    articles = []
    for each in shown:
        body = "".join(f'<span class="{kind}">{escape(text)}</span>' for kind, text in pieces(preview, each))
        articles.append(f"<article><h2>{escape(title(each))}</h2><pre>{body}</pre></article>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    legend = '<p><span class="learnt">learnt</span> · <span class="read">read</span> · <span class="mark">cut or left out</span></p>'
    name = escape(preview.run.model.model_name_or_path)
    page = f"<!doctype html><html lang=en><head>{head}<title>Rows of {name}</title><style>{STYLE}</style></head>"
    page += f"<body><h1>What {name} is trained on</h1>{legend}{''.join(articles)}</body></html>\n"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: {path} cannot be written: {error.strerror}") from None
    return len(articles)
