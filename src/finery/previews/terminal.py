"""Rows for people at a terminal: what is learnt in colour, cuts and borders marked."""

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from finery.log import plural
from finery.previews.rows import Preview, Shown, spans

LEARNT = "bold green"
READ = "grey50"
MARK = "bold magenta"


def draw(preview: Preview, shown: Shown, console: Console) -> None:
    """Print one sample or row."""
    console.rule(Text(title(shown)), align="left", style=READ)
    console.print(_text(preview, shown), soft_wrap=True)


def title(shown: Shown) -> str:
    """Where it comes from, and how many of its tokens are learnt."""
    where = shown.where
    step = f"step {where['step']}, unit {where['unit']}: " if "step" in where else ""
    if "rows" in where:
        name = ", ".join(f"{row['dataset']} row {row['row']}" for row in where["rows"])
    else:
        name = f"{where['dataset']} row {where['row']} ({where['set']})" if where["dataset"] else "a block of texts"
    tokens = sum(len(row.ids) for row in shown.rows)
    learnt = sum(row.num_supervised for row in shown.rows)
    cut = f", {shown.cut:,} cut away" if shown.cut else ""
    return f"{step}{name}: {plural(tokens, 'token')}, {learnt:,} learnt{cut}"


def pieces(preview: Preview, shown: Shown) -> Iterator[tuple[str, str]]:
    """Texts with what they are: `learnt`, `read`, `border` (another row begins) or `mark` (a cut, or why there is nothing)."""
    if shown.reason:
        yield "mark", f"left out: {shown.reason}"
    for number, row in enumerate(shown.rows):
        if number:
            yield "border", "another row"
        for learnt, ids in spans(row):
            yield ("learnt" if learnt else "read"), preview.decode(ids.tolist())
    if shown.cut and shown.rows:
        beside = f"; {' and '.join(shown.lost)} went with them" if shown.lost else ""
        yield "mark", f"✂ {plural(shown.cut, 'token')} cut away{beside}"


def _text(preview: Preview, shown: Shown) -> Text:
    text = Text()
    for kind, piece in pieces(preview, shown):
        if kind == "border":
            text.append(f"\n┄┄ {piece} ┄┄\n", MARK)
        elif kind == "mark":
            text.append(f"{' ' if text else ''}[{piece}]", MARK)
        else:
            text.append(piece, LEARNT if kind == "learnt" else READ)
    return text
