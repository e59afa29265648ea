"""What a comparison found: whether the export is what was trained, as a file and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from finery import __version__
from finery.exports.base import Limits
from finery.parity.answers import Answers, Distance, distance, effect
from finery.parity.probes import Probe
from finery.parity.reopened import Reopened


@dataclass(frozen=True)
class Report:
    """The comparison of an export with what was trained."""

    form: str
    dtype: str  # of the exported weights, where they are plain
    computed_in: str
    limits: Limits
    num_probes: int
    faults: Sequence[str] = ()  # why it is not what was trained
    notes: Sequence[str] = ()
    ids_equal: int = 0  # probes of which the export's own tokenizer and template make the same tokens
    stop_ids: Sequence[int] = ()
    distance: Distance | None = None
    exact: Distance | None = None  # from the trained model merged in memory and rounded once
    moved: Distance | None = None  # how far the training has moved the base
    effect: float | None = None  # how much of that is in the export: 1 all
    as_trained: Distance | None = None  # of the export from the model as it was trained, on weights in few bits
    texts: Sequence[dict[str, str]] = ()
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the export is what was trained."""
        return not self.faults

    def told(self) -> dict[str, Any]:
        """What the file in the export's folder says."""
        return {"finery": __version__, "verified": True, "passed": self.passed, **asdict(self)}

    def table(self) -> str:
        """A line for each thing that was compared."""
        rows = list(self._rows())
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {limit}".rstrip() for name, value, limit in rows)

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        yield "prompts with the same tokens", f"{self.ids_equal} of {self.num_probes}", "all"
        if self.distance:
            own = self.distance
            yield "mean KL from the trained model", f"{own.mean_kl:.2e}", f"at most {self.limits.mean_kl:.0e}"
            yield "largest KL", f"{own.max_kl:.2e}", ""
            yield "mean and largest difference of logits", f"{own.mean_delta:.2e}, {own.max_delta:.2e}", ""
            yield "places with the same likeliest token", f"{own.same_next:.1%} of {own.num_places}", ""
        if self.exact and self.limits.exact:
            yield "mean KL from what one rounding gives", f"{self.exact.mean_kl:.2e}", f"at most {self.limits.exact:.0e}"
        if self.moved:
            yield "mean KL of the trained model from its base", f"{self.moved.mean_kl:.2e}", ""
        if self.effect is not None:
            yield (
                "of the training's effect, the export has",
                f"{self.effect:.1%}",
                "{:.0%} to {:.0%}".format(*self.limits.effect) if self.limits.effect else "",
            )
        if self.as_trained:
            yield "mean KL from the model on few bits, as trained", f"{self.as_trained.mean_kl:.2e}", ""
        same = sum(text["trained"] == text["exported"] for text in self.texts)
        yield "written answers that are the same", f"{same} of {len(self.texts)}", ""


@dataclass(frozen=True)
class Trained:
    """The model that was trained, and what is known of it."""

    answers: Answers
    rounded: Answers | None  # merged in memory, and rounded once to the export's format
    base: Answers | None  # without what was trained
    packed: Answers | None  # on weights in few bits, as it was trained
    stop_ids: frozenset[int]
    lineage: dict[str, Any]


def compare(trained: Trained, found: Reopened, probes: Sequence[Probe], tokenizer: Any, form: Any, dtypes: tuple[Any, str]) -> Report:
    """A report; `dtypes` are the format of the exported weights and the name of what was computed in."""
    dtype, computed_in = dtypes
    start = Report(form.name, str(dtype).removeprefix("torch."), computed_in, form.limits(dtype), len(probes), lineage=trained.lineage)
    if found.answers is None:
        return replace(start, faults=[f"it cannot be loaded: {found.failure}"])
    own, theirs = trained.answers.logits, found.answers.logits
    equal = [probe.ids == ids for probe, ids in zip(probes, found.ids, strict=True)]
    report = replace(
        start,
        ids_equal=sum(equal),
        stop_ids=list(found.stop_ids),
        distance=distance(own, theirs),
        exact=distance(trained.rounded.logits, theirs) if trained.rounded else None,
        moved=distance(trained.base.logits, own) if trained.base else None,
        effect=effect(trained.base.logits, own, theirs) if trained.base else None,
        as_trained=distance(trained.packed.logits, theirs) if trained.packed else None,
        texts=_texts(probes, trained.answers, found.answers, tokenizer),
    )
    faults = list(_faults(report, probes, equal, trained.stop_ids, tokenizer))
    return replace(report, faults=faults, notes=[] if faults else list(_notes(report)))


def _faults(report: Report, probes: Sequence[Probe], equal: Sequence[bool], stop_ids: frozenset[int], tokenizer: Any) -> Iterator[str]:
    if not all(equal):
        first = probes[equal.index(False)]
        yield f"its tokenizer or its template makes other tokens of {first.shown[:60]!r} than the training did"
    if lacking := sorted(stop_ids - set(report.stop_ids)):
        yield f"its generation config does not end answers at {', '.join(map(repr, tokenizer.convert_ids_to_tokens(lacking)))}"
    limits = report.limits
    if report.distance is None:
        yield "its logits are not finite, or it lacks rows for tokens of the prompts"
    elif report.distance.mean_kl > limits.mean_kl:
        far = f"{report.distance.mean_kl:.2e} nats (mean KL)"
        yield f"its next tokens are {far} from the trained model's, at most {limits.mean_kl:.0e} may be"
    if limits.exact is not None and report.exact and report.exact.mean_kl > limits.exact:
        yield f"it is {report.exact.mean_kl:.2e} nats (mean KL) from what the trained model gives when it is merged and rounded once"
    if report.effect is not None and limits.effect and not limits.effect[0] <= report.effect <= limits.effect[1]:
        yield f"it has {report.effect:.0%} of what the training has changed"


def _notes(report: Report) -> Iterator[str]:
    if report.moved and report.effect is None:
        yield "the training has changed too little to tell whether its effect is in the export"
    if report.effect is not None and report.limits.effect and report.effect < _MOSTLY:
        kept = f"{report.effect:.0%} of what the training has changed is left in this form"
        yield f"{kept}, since half precision cannot hold smaller changes: 'export_dtype: float32' keeps all"


_MOSTLY = 0.9


def _texts(probes: Sequence[Probe], first: Answers, second: Answers, tokenizer: Any) -> list[dict[str, str]]:
    asked = [probe.shown for probe in probes if probe.answered]
    return [
        {"prompt": prompt, "trained": tokenizer.decode(one), "exported": tokenizer.decode(other)}
        for prompt, one, other in zip(asked, first.written, second.written, strict=True)
    ]
