"""Token ids and labels by the reference's rule: written out once more here, and as LLaMA-Factory 0.9.5 itself encodes the demo sets.

What it made is kept in tests/golden/reference_rows.json; benchmarks/peer_rows.py made it and can again.
"""

import json
import random
import runpy
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from finery.data.formats import FORMATS
from finery.data.registry import find_entry
from finery.data.rows.base import IGNORED, Encoded, RowOptions
from finery.data.rows.chat import Chat
from finery.data.sample import BadRecord, Sample
from finery.data.slots import Slots, SlotTemplate
from finery.data.template import Template, TemplateOptions, Turn, load_template
from letters import Given

ROOT = Path(__file__).parents[2]
PEER = runpy.run_path(str(ROOT / "benchmarks" / "peer_sets.py"))
GOLDEN = json.loads((ROOT / "tests" / "golden" / "reference_rows.json").read_text(encoding="utf-8"))
SETS: dict[str, dict[str, Any]] = PEER["ENTRIES"]
MASKS: dict[str, dict[str, Any]] = PEER["OPTIONS"]
CUTOFFS: tuple[int, ...] = PEER["CUTOFFS"]
END = -1
"""The end token of the given turns below; no turn holds it."""


def kept(num_source: int, num_target: int, room: int) -> tuple[int, int]:
    """The reference's share of question and answer."""
    if 2 * num_target < room:
        most = room
    elif 2 * num_source < room:
        most = room - num_source
    else:
        most = int(room * num_target / (num_source + num_target))
    target = min(most, num_target)
    return min(max(room - target, 0), num_source), target


def plain(turns: list[Turn], cutoff_len: int, mask: str, late_end: int | None = None) -> tuple[list[int], list[int]]:
    """The rule as it is described: ids and labels of one conversation.

    `late_end` is the end of templates that write it once, after the last answer; the label of a turn's first token is then the end of the
    answer before it. The reference counts turns from the last one under mask_history and so learns the ends of answers that
    are masked; here an end is learnt where its answer is.
    """
    last_first = mask == "mask_history"
    total = 0 if late_end is None else 1
    parts: list[tuple[bool, list[int], list[int]]] = []  # whether the answer is learnt; question and answer
    for count, turn in enumerate(reversed(turns) if last_first else turns):
        if total >= cutoff_len:
            break
        num_source, num_target = kept(len(turn.source), len(turn.target), cutoff_len - total)
        total += num_source + num_target
        parts.append((count == 0 or not last_first, turn.source[:num_source], turn.target[:num_target]))
    ids: list[int] = []
    labels: list[int] = []
    before = False  # the answer before is learnt
    for learnt, source, target in reversed(parts) if last_first else parts:
        read = list(source) if mask == "train_on_prompt" else [IGNORED] * len(source)
        if late_end is not None and before and read:
            read[0] = late_end
        ids += [*source, *target]
        labels += read + (list(target) if learnt else [IGNORED] * len(target))
        before = learnt
    if late_end is not None:
        ids.append(late_end)
        labels.append(late_end)
    return ids, labels


def pairs(encoded: Encoded) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of a sample's row, empty where nothing of it is left to learn."""
    assert len(encoded.rows) <= 1
    for row in encoded.rows:
        yield row.ids.tolist(), row.labels.tolist()
    if not encoded.rows:
        yield [], []


def expected(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Finery leaves a row out of which nothing is learnt; the first token of a row is never predicted."""
    return (ids, labels) if any(label != IGNORED for label in labels[1:]) else ([], [])


def read_samples(name: str, shared: Path) -> list[Sample]:
    """The samples of a set, by Finery's registry and formats."""
    entry = find_entry(name, {name: {"file_name": f"{name}.json", **SETS[name]}})
    read = FORMATS[entry.formatting](entry.columns, entry.tags).read
    return [read(record) for record in records(shared)[name]]


@cache
def records(shared: Path) -> dict[str, list[dict[str, Any]]]:
    return PEER["read_sets"](shared / "data")


@pytest.mark.parametrize(("mask", "late_end"), [*product(MASKS, [None]), ("neither", END), ("mask_history", END)])
def test_given_turns_at_every_cutoff(mask: str, late_end: int | None) -> None:
    draw = random.Random(3)
    for _ in range(60):
        lengths = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 4))]
        numbers = iter(range(100))
        turns = [Turn([next(numbers) for _ in range(source)], [next(numbers) for _ in range(target)]) for source, target in lengths]
        whole = sum(source + target for source, target in lengths)
        for cutoff_len in range(2, whole + 3):
            rows = Chat(Given(turns, late_end=late_end), RowOptions(cutoff_len=cutoff_len, **MASKS[mask]))
            (found,) = pairs(rows.encode(Sample(())))
            assert found == expected(*plain(turns, cutoff_len, mask, late_end)), (lengths, cutoff_len)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("template_name", PEER["TEMPLATES"])
def test_rows_by_the_rule(tokenizer: Any, shared: Path, name: str, template_name: str) -> None:
    template = load_template(TemplateOptions(template=template_name), tokenizer)
    for sample in read_samples(name, shared)[::8]:
        (turns,) = template.encode(sample)
        for mask, cutoff_len in product(MASKS, (*CUTOFFS, 100, 7)):
            (found,) = pairs(Chat(template, RowOptions(cutoff_len=cutoff_len, **MASKS[mask])).encode(sample))
            assert found == expected(*plain(turns, cutoff_len, mask)), (mask, cutoff_len)


@pytest.mark.real
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("template_name", PEER["TEMPLATES"])
def test_rows_as_the_reference_makes_them(
    real_model: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, name: str, template_name: str
) -> None:
    from transformers import AutoTokenizer

    template = load_template(TemplateOptions(template=template_name), AutoTokenizer.from_pretrained(str(real_model)))
    assert digests(template, read_samples(name, shared), MASKS, monkeypatch) == GOLDEN["digests"][template_name][name]


@pytest.mark.real
def test_one_end_after_the_last_answer_as_the_reference_writes_it(real_model: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under mask_history it would differ: there the reference learns the ends of answers that are masked."""
    from transformers import AutoTokenizer

    slots = Slots(
        PEER["LATE_END"],
        user=("### User:\n{{content}}\n\n### Assistant:\n",),
        system=("### System:\n{{content}}\n\n",),
        assistant=("{{content}}",),
        efficient_eos=True,
    )
    template = SlotTemplate(slots, AutoTokenizer.from_pretrained(str(real_model)))
    for name in SETS:
        golden = GOLDEN["digests"][PEER["LATE_END"]][name]
        for key, found in digests(template, read_samples(name, shared), ["neither"], monkeypatch).items():
            assert found == golden[key], (name, key)


def digests(template: Template, samples: list[Sample], masks: Iterable[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What `benchmarks/peer_rows.py` keeps of the peer's rows, of Finery's rows."""
    made: dict[int, list[list[Turn]]] = {}  # the same for every mask and cutoff
    for sample in samples:
        with suppress(BadRecord):
            made[id(sample)] = template.encode(sample)
    found = {}
    with monkeypatch.context() as patch:
        patch.setattr(template, "turns", lambda sample: Given(*made.get(id(sample), ())).turns(sample))
        for mask, cutoff_len in product(masks, CUTOFFS):
            rows = Chat(template, RowOptions(cutoff_len=cutoff_len, **MASKS[mask]))
            found[f"{mask} {cutoff_len}"] = PEER["digest"](pair for sample in samples for pair in pairs(rows.encode(sample)))
    return found


def test_the_kept_digests_are_of_every_combination() -> None:
    """And every mask and cut makes a difference, but masking the history of conversations that have none."""
    assert GOLDEN["digests"].keys() == {*PEER["TEMPLATES"], PEER["LATE_END"]}
    for template_name, sets in GOLDEN["digests"].items():
        masks = [mask for mask in MASKS if (template_name, mask) != (PEER["LATE_END"], "train_on_prompt")]
        assert sets.keys() == SETS.keys()
        for name, kept_digests in sets.items():
            assert kept_digests.keys() == {f"{mask} {cutoff_len}" for mask, cutoff_len in product(masks, CUTOFFS)}
            single = name in ("identity", "alpaca_en_demo", "alpaca_zh_demo")
            assert len({digest for _, _, digest in kept_digests.values()}) == len(CUTOFFS) * (len(masks) - single), name
