"""Show how samples become tokens and which are learnt: the very rows and steps that a run trains on."""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from finery.errors import UserError
from finery.log import get_logger
from finery.run import Run

if TYPE_CHECKING:
    from finery.previews.rows import Preview, Shown

log = get_logger(__name__)

NUM_SHOWN = 3


def add_arguments(parser: ArgumentParser) -> None:
    """What is not a key of the run."""
    parser.usage = "finery show RUN.yaml [--dataset NAME] [--row N] [--num N] [--step N | --worst N] [--json | --html FILE] [key=value] ..."
    parser.add_argument("--dataset", dest="of", metavar="NAME", help="only rows of this data set of the run")
    parser.add_argument("--row", type=int, help="only this row, counted from 0 in its file")
    parser.add_argument("--num", type=int, help=f"how many are shown ({NUM_SHOWN}; with --json all)")
    parser.add_argument("--step", type=int, help="the rows of this optimizer step, counted from 1, instead of rows in the files' order")
    parser.add_argument("--worst", type=int, metavar="N", help="the N rows that this run has learnt worst, if it had 'loss_ledger: true'")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: ids, labels, positions, segments, text, what was cut")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")


def run(args: Namespace, words: list[str]) -> int:
    """Print rows, or write them."""
    _check(args)
    chosen = Run.read(words)
    if not (chosen.data.dataset or chosen.data.eval_dataset):
        raise UserError("there is nothing to show: the run has no 'dataset'")
    from finery.previews.rows import Preview

    preview = Preview(chosen)
    try:
        _show(preview, args)
    finally:
        preview.sets.stop()
    preview.sets.confirm()
    return 0


def _check(args: Namespace) -> None:
    for name in ("num", "worst"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise UserError(f"--{name} should be 1 or more, found {number}")
    if args.step is not None and (args.row is not None or args.of is not None):
        raise UserError("--step shows a whole step; leave out --row and --dataset")
    if args.worst is not None and not (args.row is args.num is args.step is args.html is None):
        raise UserError("--worst shows rows by their loss; leave out --row, --num, --step and --html")


def _show(preview: "Preview", args: Namespace) -> None:
    if args.worst is not None:
        _show_worst(preview, args)
        return
    shown = _chosen(preview, args)
    if args.html:
        from finery.previews import page

        count = page.write(preview, shown, Path(args.html))
        log.info("%s shows %d samples", args.html, count)
    elif args.json:
        for each in shown:
            print(json.dumps(each.as_dict(), ensure_ascii=False))
    else:
        from rich.console import Console

        from finery.previews import terminal

        console = Console(file=sys.stdout, highlight=False)
        for each in shown:
            terminal.draw(preview, each, console)


def _show_worst(preview: "Preview", args: Namespace) -> None:
    from finery.previews.worst import draw, worst

    if preview.run.loop.output_dir is None:
        raise UserError("--worst reads the ledger in 'output_dir', and this run names none")
    sources = [source for units in preview.sets.by_name.values() for source in units.samples.sources]
    found = worst(Path(preview.run.loop.output_dir), sources, args.worst, args.of)
    if args.json:
        for each in found:
            print(json.dumps(each.as_dict(), ensure_ascii=False))
        return
    from rich.console import Console

    draw(found, Console(file=sys.stdout, highlight=False))


def _chosen(preview: "Preview", args: Namespace) -> "Iterator[Shown]":
    every = preview.step(args.step) if args.step is not None else preview.samples(args.of, args.row)
    count = args.num or (None if args.json or args.step or args.row is not None else NUM_SHOWN)
    return islice(every, count)
