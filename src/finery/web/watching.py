"""What a page shows of a job: read from its files, so that any number of pages may look, and none of them holds anything."""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finery.jobs import Job, Status, jobs
from finery.training.callbacks.plot_loss import smooth
from finery.web.curves import Curve
from finery.web.texts import Texts

MOST_POINTS = 1000
"""Of a curve; of a longer one, every n-th is drawn."""
_NUM_LINES = 200
_MOST_BYTES = 32 << 20
_WARNING = re.compile(r"(warning|not finite|non-finite|diverg|leap|cannot be written|no learnt|skipped|Traceback|error:)", re.I)
_ANSWERING = re.compile(r"answering .*: ([\d,]+) samples of ([\d,]+) samples")
_MOST_WARNINGS = 5


@dataclass(frozen=True)
class Seen:
    """A job at one moment."""

    job: Job
    status: Status
    lines: Sequence[Mapping[str, Any]]  # of the run's own log
    output: Sequence[str]

    @property
    def signature(self) -> str:
        """Another one where its curves or its state have changed."""
        return f"{self.job.id} {len(self.lines)} {self.status.state}"


def see(job: Job) -> Seen:
    """Look at a job."""
    status = job.status()
    return Seen(job, status, log_of(job, status), list(job.lines(last=_NUM_LINES)))


def folder_of(job: Job) -> Path | None:
    """Where its run writes."""
    return Path(job.cwd) / job.output_dir if job.output_dir else None


def log_of(job: Job, status: Status) -> list[dict[str, Any]]:
    """The lines of a run's trainer_log.jsonl; none of an earlier run's in the same folder."""
    path = (folder_of(job) or Path()) / "trainer_log.jsonl"
    if job.output_dir is None or not path.is_file() or path.stat().st_mtime < (status.began or job.created):
        return []
    return log_lines(path)


def log_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines of a trainer_log.jsonl, thousands of them."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MOST_BYTES))
        return [line for text in file.read().splitlines() if (line := _object(text)) is not None]


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        told = json.loads(text)
    except ValueError:  # the last one may be on its way
        return None
    return told if isinstance(told, dict) and "current_steps" in told else None


def latest(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of all that a log tells."""
    found: dict[str, Any] = {}
    for line in lines:
        found |= line
    return found


def losses(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The loss by optimizer step, as measured."""
    return [(line["current_steps"], line["loss"]) for line in lines if "loss" in line]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same, smoothed."""
    return list(zip((step for step, _ in points), smooth([loss for _, loss in points]), strict=True))


def loss_curves(lines: Sequence[Mapping[str, Any]], spoken: Texts) -> list[Curve]:
    """The loss by optimizer step: as measured, smoothed, and of evaluations."""
    train = losses(lines)
    held_out = [(line["current_steps"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    named = (("curve_train", train, "faint"), ("curve_smoothed", smoothed(train), "c0"), ("curve_eval", held_out, "c1"))
    return [Curve(spoken.say(name), thinned(points), look) for name, points, look in named]


def rates(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The learning rate by optimizer step."""
    return thinned([(line["current_steps"], line["lr"]) for line in lines if "lr" in line])


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Few enough to be drawn."""
    step = -(-len(points) // MOST_POINTS) or 1
    return list(points[::step])


# ------------------------------------------------------------------ in words


def told(job: Job, status: Status) -> str:
    """A job in a list."""
    progress = f" {status.progress.step}/{status.progress.total}" if status.progress else ""
    return f"{job.id}{f' {job.name}' if job.name else ''} · {status.state}{progress} · {job.output_dir or '-'}"


def listed() -> list[tuple[str, str]]:
    """Every job, the newest first, as a list shows it, with its id."""
    return [(told(job, job.status()), job.id) for job in reversed(jobs())]


def bar(seen: Seen, spoken: Texts) -> str:
    """A line on how it stands, and a bar, as HTML."""
    status, progress = seen.status, seen.status.progress
    done = (progress.step, progress.total) if progress else answered(seen)
    share = 100 * done[0] / max(done[1], 1) if done else (100 if status.state in ("finished", "failed", "lost") else 0)
    facts = [spoken.say(f"state_{status.state}")]
    if done:
        facts.append(spoken.say("fact_steps" if progress else "fact_answers", step=f"{done[0]:,}", total=f"{done[1]:,}"))
    facts += [*_measured(seen, spoken), *_times(status, spoken)]
    now = status.why or (seen.output[-1] if status.state == "running" and not progress and seen.output else "")
    why = f'<p class="why">{html.escape(now)}</p>' if now else ""
    line = " · ".join(html.escape(fact) for fact in facts)
    said = f'role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share:.0f}"'
    return f'<div class="job {status.state}"><p>{line}</p><div class="bar" {said}><div style="width:{share:.1f}%"></div></div>{why}</div>'


def answered(seen: Seen) -> tuple[int, int] | None:
    """How many samples a run that answers has answered, of how many, as it printed last; nothing once it has ended."""
    if seen.status.has_ended:
        return None
    found = next((found for line in reversed(seen.output) if (found := _ANSWERING.match(line))), None)
    return (int(found[1].replace(",", "")), int(found[2].replace(",", ""))) if found else None


def _measured(seen: Seen, spoken: Texts) -> Iterable[str]:
    last = latest(seen.lines)
    if "loss" in last:
        yield spoken.say("fact_loss", loss=f"{last['loss']:.4f}")
    if "eval_loss" in last:
        yield spoken.say("fact_eval_loss", loss=f"{last['eval_loss']:.4f}")
    if not seen.status.has_ended and "tokens_per_second" in last:
        yield spoken.say("fact_speed", speed=f"{last['tokens_per_second']:,.0f}")
    if not seen.status.has_ended and (held := memory_bytes(seen.status.pid)):
        yield spoken.say("fact_memory", size=f"{held / 2**30:.1f}")


def _times(status: Status, spoken: Texts) -> Iterable[str]:
    if status.began:
        yield spoken.say("fact_passed", time=length((status.ended or time.time()) - status.began))
    if status.progress and status.progress.remaining and not status.has_ended:
        yield spoken.say("fact_left", time=status.progress.remaining)
    if status.waits_for:
        yield spoken.say("fact_waits", jobs=", ".join(status.waits_for))


def length(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = max(int(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def memory_bytes(pid: int | None) -> int:
    """What a run and its children hold resident; 0 where that cannot be seen."""
    import psutil

    try:
        run = psutil.Process(pid) if pid else None
        return sum(one.memory_info().rss for one in [run, *run.children(recursive=True)]) if run else 0
    except psutil.Error:
        return 0


def warnings(seen: Seen) -> str:
    """Lines that a person should see, as HTML; nothing where there are none."""
    found = [line for line in seen.output if _WARNING.search(line)][-_MOST_WARNINGS:]
    return "".join(f'<p class="warning">{html.escape(line)}</p>' for line in found)


def output(seen: Seen) -> str:
    """The last lines of what was printed, as HTML."""
    return f'<pre class="log" tabindex="0">{html.escape(chr(10).join(seen.output))}</pre>'
