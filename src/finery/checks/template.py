"""Templates: every conversation is proved to be trained as it is served, token by token."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finery.checks.base import Check, Checked, Effect, Finding, Groups, Opened, open_rows, unlearnable
from finery.compat import is_first
from finery.data.content import Rate
from finery.data.load import Sets
from finery.data.proof import Fault, Proof
from finery.data.registry import Catalogue, read_catalogue
from finery.data.sample import BadRecord, Message, Sample
from finery.data.template import Template
from finery.errors import UserError
from finery.files import read_yaml
from finery.log import get_logger, plural
from finery.models.ending import save_stop_tokens
from finery.models.load import locate_model
from finery.models.tokenizer import load_tokenizer, save_tokenizer
from finery.training.preparation import run_template

__all__ = ["Templates"]

NUM_DRAWN = 200
"""So many rows of the user's are proved before a run begins; `finery check` proves them all."""
_MOST_TOLD = 3
_MOST_SPELLED = 6
_UNBOUNDED = 1 << 40
_WEATHER = {
    "name": "weather",
    "description": "The weather of the next days.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "A city's name."},
            "days": {"type": "integer", "description": "How many days."},
        },
        "required": ["city"],
    },
}
_ROLES = {"u": "user", "a": "assistant", "f": "function", "o": "observation"}
_MEND = "choose another 'template', and report it, if neither the template nor the data can be to blame"

log = get_logger(__name__)


class Templates(Check):
    """Proves that every row is trained as it will be served, and a fixed set of conversations that are hard on templates."""

    def findings(self, run: Any) -> Iterator[Finding]:
        """Of the template that a run trains with, on the rows of its data sets."""
        if run.method.rows != "chat":
            return
        try:
            model = locate_model(run.model)
            template = run_template(run, load_tokenizer(model, run.model.trust_remote_code))
            proof, faults = prepared(run, template, model)
        except UserError as error:
            yield from (Finding("template", *_split(complaint), "stops the run") for complaint in error.complaints)
            return
        yield from (Finding("template", *_told(fault)) for fault in faults)
        seams: set[str] = set()
        for opened in _opened(run):
            yield from self._of_rows(proof, opened, run.method.reads, seams)
        yield from self._of_nasty(proof, seams)

    def _of_rows(self, proof: Proof, opened: Opened, reads: Any, seams: set[str]) -> Iterator[Finding]:
        source, began = opened.source, time.monotonic()
        groups, ways = Groups(source), Counter()
        rate = Rate(f"proving {source.name}", "rows", opened.size)
        for row in range(opened.first, opened.first + opened.size):
            rate.add(1)
            try:
                sample = source.sample(row)
            except BadRecord:
                continue  # the check of data tells of it
            if unlearnable(sample, True, reads):
                continue
            proved = proof.of(sample)
            ways[proved.way] += 1
            if proved.way == "refused":
                groups.add(row, "left out", proved.reason)
            for fault in proved.faults:
                seams.add(fault.kind)
                what, mend, effect = _told(fault)
                groups.add(row, effect, what, mend, fault.kind)
        rate.end()
        yield from groups.findings()
        self._checked(f"{proof.template.told} on data set {source.name!r}", ways, began)

    def _of_nasty(self, proof: Proof, seams: set[str]) -> Iterator[Finding]:
        """What stops a run, each kind once, and seams that no row of the user's has."""
        began, ways, told = time.monotonic(), Counter(), set()
        for title, sample in nasty_set(proof.template):
            proved = proof.of(sample)
            ways[proved.way] += 1
            for fault in proved.faults:
                new = fault.kind.startswith("seam") and fault.kind not in seams
                if (fault.fatal or new) and fault.kind not in told:
                    told.add(fault.kind)
                    what, mend, effect = _told(fault)
                    yield Finding("template", f"on {title!r}, {what}", mend, effect)
        self._checked(f"{proof.template.told} on hard conversations", ways, began)

    def _checked(self, name: str, ways: Counter[str], began: float) -> None:
        told = f"{ways['row']:,} as one row, {ways['turns']:,} as one row per answer"
        size = ways.total()
        self.checked.append(Checked(name, size, size - ways["refused"], time.monotonic() - began, "", told, again=True))


def prove(run: Any, template: Template, sets: Sets) -> None:
    """The gate before weights are loaded: hard conversations, and rows drawn from the user's; raises `UserError`."""
    if run.method.rows != "chat" or not is_first():
        return
    proof, faults = prepared(run, template, locate_model(run.model))
    fatal = {fault.kind: _line("", fault) for fault in reversed(faults) if fault.fatal}
    refused: list[str] = []
    for title, sample in nasty_set(template):
        proved = proof.of(sample)
        refused += [repr(title)] if proved.way == "refused" else []
        fatal |= {fault.kind: _line(f"on {title!r}, ", fault) for fault in proved.faults if fault.fatal and fault.kind not in fatal}
    known: set[str] = set()
    ways: Counter[str] = Counter()
    for place, sample in _drawn(sets, run.loop.seed, run.method.reads):
        proved = proof.of(sample)
        ways[proved.way] += 1
        for fault in proved.faults:
            if fault.fatal:
                fatal.setdefault(fault.kind, _line(f"{place}: ", fault))
            elif fault.kind not in known:
                known.add(fault.kind)
                log.warning("%s: %s", place, _line("", fault))
    if fatal:
        more = [f"and {plural(len(fatal) - _MOST_TOLD, 'further fault')}, which 'finery check' tells"] if len(fatal) > _MOST_TOLD else []
        raise UserError(*(f"'template': {line}" for line in list(fatal.values())[:_MOST_TOLD]), *more)
    rows = f"{ways['row'] + ways['turns']:,} of {plural(ways.total(), 'drawn row')}"
    told = f", but for those that it refuses: {', '.join(refused)}" if refused else ""
    log.info("%s: proved that %s are trained as they are served, and the hard conversations%s", template.told, rows, told)


def prepared(run: Any, template: Template, model: Path) -> tuple[Proof, list[Fault]]:
    """The proof of a template with what is saved and loaded again, and what is wrong whatever the conversation.

    `model` is the folder of the base model, whose generation config is saved, too.
    """
    from transformers import GenerationConfig

    own = GenerationConfig.from_pretrained(str(model)) if (model / "generation_config.json").is_file() else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(template.tokenizer, folder, template.jinja)
        save_stop_tokens(SimpleNamespace(generation_config=own), folder, template.stop_ids)
        try:
            saved = load_tokenizer(folder, run.model.trust_remote_code)
        except UserError as error:
            raise UserError(*(f"what is saved could not be loaded again: {line}" for line in error.complaints)) from None
        stops = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    again = deepcopy(saved)  # what a template sets is its own; quicker than to read it once more
    saved.model_max_length = _UNBOUNDED
    proof = Proof(template, run_template(run, again), saved, run.rows)
    faults = list(proof.of_all())
    if set(stops if isinstance(stops, list) else [stops]) != template.stop_ids:
        told = f"answers end at the tokens {sorted(template.stop_ids)}, the saved generation config says {stops}"
        faults.append(Fault(told, kind="config"))
    return proof, faults


def nasty_set(template: Template) -> Iterator[tuple[str, Sample]]:
    """Conversations that are hard on templates, with their names."""
    tokenizer = template.tokenizer
    ends = [str(tokenizer.convert_ids_to_tokens(id)) for id in sorted(template.stop_ids)]
    spelled = "".join(list(dict.fromkeys([*ends, *tokenizer.all_special_tokens]))[:_MOST_SPELLED])
    for entry in read_yaml(Path(__file__).with_name("nasty.yaml")):
        messages = [_message(turn, spelled) for turn in entry["turns"]] * entry.get("repeat", 1)
        tools = json.dumps([_WEATHER]) if entry.get("tools") else ""
        yield entry["name"], Sample(tuple(messages), entry.get("system", "").replace("{{special}}", spelled), tools)


def _message(turn: dict[str, Any], spelled: str) -> Message:
    letter = next(iter(turn))
    text = turn[letter].replace("{{special}}", spelled)
    message = Message(_ROLES[letter], text, turn.get("thought", ""), turn.get("before", ""))  # type: ignore[arg-type]
    return replace(message, train=False) if turn.get("read") else message


def _drawn(sets: Sets, seed: int, reads: Any) -> Iterator[tuple[str, Sample]]:
    """Rows of the training set, each with its place; none of a stream's, whose rows are read once."""
    samples = sets.train.samples if sets.train is not None else None
    if samples is None or any(source.sequential for source in samples.sources):
        return
    places = random.Random(seed).sample(range(len(samples)), min(NUM_DRAWN, len(samples)))
    for place in places:
        number, record = samples.locate(place)
        source = samples.sources[number]
        try:
            sample = source.sample(record)
        except BadRecord:
            continue
        if not unlearnable(sample, True, reads):
            yield source.told(record), sample


def _opened(run: Any) -> Iterator[Opened]:
    """The data sets of a run that can be read twice; what is wrong with the others is told by the check of data."""
    catalogue = read_catalogue(run.data.dataset_dir, run.model.download) or Catalogue()
    names = [(key, name) for key in ("dataset", "eval_dataset") for name in getattr(run.data, key)]
    for key, name in {name: (key, name) for key, name in reversed(names)}.values():
        opening = open_rows(key, name, run.data, run.model.download, catalogue, run.method)
        opened = None
        while True:
            try:
                next(opening)
            except StopIteration as end:
                opened = end.value
                break
        if opened is not None and not opened.source.sequential:
            yield opened


def _told(fault: Fault) -> tuple[str, str, Effect]:
    return fault.what, fault.mend or (_MEND if fault.fatal else ""), "stops the run" if fault.fatal else "kept"


def _line(before: str, fault: Fault) -> str:
    what, mend, _ = _told(fault)
    return f"{before}{what}{f'; {mend}' if mend else ''}"


def _split(complaint: str) -> tuple[str, str]:
    what, _, mend = complaint.partition("; ")
    return what, mend
