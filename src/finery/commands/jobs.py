"""List, follow, stop and remove runs that train in the background (started by: finery train RUN.yaml --detach)."""

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from finery.errors import UserError, suggestion
from finery.jobs import Job, Status, find, jobs
from finery.log import get_logger, plural

log = get_logger(__name__)

_WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.25
COLUMNS = ("id", "name", "state", "step", "loss", "left", "time", "output")


def add_arguments(parser: ArgumentParser) -> None:
    """What to do, and with which job."""
    parser.usage = "finery jobs [list [--json] | follow [ID] [--lines N] | stop ID [--now] [--wait SECONDS] | remove ID ...]"
    parser.add_argument("verb", nargs="?", default="list", help="list (the default), follow, stop or remove")
    parser.add_argument("ids", nargs="*", metavar="ID", help="an id, its beginning or its end, a job's name, or: last")
    parser.add_argument("--json", action="store_true", help="list: print one JSON object a line")
    parser.add_argument("--lines", type=int, default=20, metavar="N", help="follow: begin with the last N lines (20)")
    parser.add_argument("--now", action="store_true", help="stop: kill every process of the job at once; what was not saved is lost")
    parser.add_argument("--wait", type=float, default=_WAIT_SECONDS, metavar="SECONDS", help="stop: how long to wait for the end (120)")


def run(args: Namespace, words: list[str]) -> int:
    """Do it; of `follow` and `stop` the exit code tells how the job has ended."""
    if words:
        raise UserError(f"there is no {words[0]!r} here; finery jobs --help tells what there is")
    if args.verb == "list" and not args.ids:
        return _list(args.json)
    one_job = {"follow": lambda job: _follow(job, args.lines), "stop": lambda job: _stop(job, args.now, args.wait)}
    if args.verb in one_job and len(args.ids) == 1:
        return one_job[args.verb](find(args.ids[0]))
    if args.verb == "follow" and not args.ids:
        return _follow(find("last"), args.lines)
    if args.verb == "remove" and args.ids:
        return _remove([find(text) for text in args.ids])
    verbs = ("list", "follow", "stop", "remove")
    if args.verb not in verbs:
        raise UserError(f"jobs cannot be asked to {args.verb!r}{suggestion(args.verb, verbs)}; there are: {', '.join(verbs)}")
    raise UserError(f"'finery jobs {args.verb}' takes {'no id' if args.verb == 'list' else 'the id of one job'}, found {len(args.ids)}")


def _list(as_json: bool) -> int:
    every = jobs()
    if as_json:
        for job in every:
            print(json.dumps(job.as_dict(), ensure_ascii=False))
        return 0
    if not every:
        log.info("there are no jobs; finery train RUN.yaml --detach starts one")
        return 0
    rows = [_row(job, job.status()) for job in every]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*COLUMNS, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
    else:
        widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
        for row in (COLUMNS, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(job: Job, status: Status) -> tuple[str, ...]:
    """The cells of a job; `-` where there is nothing to tell, so that columns can be counted."""
    progress = status.progress
    return (
        job.id,
        job.name or "-",
        status.state,
        f"{progress.step}/{progress.total}" if progress else "-",
        f"{progress.loss:.4g}" if progress and progress.loss is not None else "-",
        progress.remaining or "-" if progress and not status.has_ended else "-",
        _length((status.ended or time.time()) - status.began) if status.began and (status.ended or not status.has_ended) else "-",
        job.output_dir or "-",
    )


def _length(seconds: float) -> str:
    whole = max(int(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _follow(job: Job, num_lines: int) -> int:
    """Print until the job has ended; Ctrl-C ends the following alone."""
    status = job.status()
    if status.state == "queued":
        log.info("job %s is queued%s", job.id, f" behind {', '.join(status.waits_for)}" if status.waits_for else "")
    try:
        for line in job.lines(follow=True, last=num_lines):
            print(line, flush=True)
    except KeyboardInterrupt:
        log.info("\njob %s goes on; finery jobs stop %s ends it", job.id, job.id)
        raise
    return _tell_end(job, job.status())


def _stop(job: Job, now: bool, wait_seconds: float) -> int:
    job.stop(now=now)
    began = time.monotonic()
    told = False
    while not (status := job.status()).has_ended:
        passed = time.monotonic() - began
        if passed > wait_seconds:
            log.warning("job %s was told, and still works after %.0f s. finery jobs stop %s --now kills it", job.id, passed, job.id)
            return 1
        if passed > 2 and not told:
            log.info(
                "job %s was told to stop: it ends its step and saves; waiting up to %.0f s (Ctrl-C stops the waiting)", job.id, wait_seconds
            )
            told = True
        time.sleep(_POLL_SECONDS)
    _tell_end(job, status)
    return 1 if status.state == "failed" else 0


def _remove(chosen: Sequence[Job]) -> int:
    for job in chosen:
        job.remove()
    log.info("removed %s; what the runs have written is where it was", plural(len(chosen), "job"))
    return 0


def _tell_end(job: Job, status: Status) -> int:
    """Say how a job has ended; 0 where it has done what it was to do."""
    why = f": {status.why}" if status.why else ""
    where = f"; everything is in {job.output_dir}" if status.state == "finished" and job.output_dir else ""
    log.info("job %s %s%s%s", job.id, {"lost": "is lost"}.get(status.state, f"has {status.state}"), why, where)
    return 0 if status.state == "finished" else 1
