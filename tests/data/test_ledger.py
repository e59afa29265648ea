"""The ledger: what became of every record; tokens in are tokens trained and tokens reported."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finery.data import ledger
from finery.data.jinja import JinjaTemplate
from finery.data.load import Sets
from finery.data.packing import PackingOptions
from finery.data.rows.base import IGNORED, Cut, Encoded, RowOptions
from finery.data.rows.chat import Chat
from finery.data.sample import Message, Sample
from finery.data.slots import Slots, SlotTemplate
from finery.data.template import Template
from finery.errors import UserError
from letters import Answers, in_order, letter_rows, open_sets, write_texts
from named import named

TRUNCATIONS = ("proportional", "drop", "keep_start", "keep_end", "split", "error")
MakeData = Callable[..., str]
Load = Callable[..., Sets]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for every test."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def templates(tokenizer: Any) -> dict[str, Template]:
    """A named template, one that writes the end of an answer late, the tokenizer's own, and one that rewrites history."""
    import copy

    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}…{% else %}{{ m.content }}"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    late = Slots("late", user=("Q: {{content}}\nA:",), assistant=("{{content}}",), system=("{{content}}\n",), efficient_eos=True)
    return {
        "named": named("chatml", copy.deepcopy(tokenizer)),
        "late": SlotTemplate(late, tokenizer),
        "own": JinjaTemplate(tokenizer),
        "rewriting": JinjaTemplate(rewriting),
    }


def made_up(dice: random.Random) -> Sample:
    """A conversation of any length."""

    def text(most: int) -> str:
        return " ".join("".join(dice.choices("abcdefgh", k=dice.randrange(1, 6))) for _ in range(dice.choice([0, 1, dice.randrange(most)])))

    messages = []
    for _ in range(dice.randrange(1, 5)):
        messages.append(Message("user", text(20) or "?"))
        messages.append(Message("assistant", text(25), train=dice.choice([None, None, None, True, False])))
    return Sample(tuple(messages), system=dice.choice(["", text(9)]), trailing=dice.choice([0, 0, 2]))


def runs(labels: Any) -> list[list[int]]:
    """The stretches of labels that are learnt."""
    found: list[list[int]] = [[]]
    for label in labels.tolist():
        if label == IGNORED:
            found.append([])
        else:
            found[-1].append(label)
    return [run for run in found if run]


@pytest.mark.parametrize("name", ["named", "late", "own", "rewriting"])
def test_tokens_in_are_trained_or_reported(templates: dict[str, Template], name: str, tokenizer: Any) -> None:
    """For random conversations, every way of cutting and every mask; what is learnt stands in the answers."""
    template, dice = templates[name], random.Random(name)
    seen = dict.fromkeys(TRUNCATIONS, 0)
    for turn in range(250):
        how, mask = TRUNCATIONS[turn % len(TRUNCATIONS)], dice.choice(["", "train_on_prompt", "mask_history"])
        options: dict[str, Any] = {"truncation": how, "cutoff_len": dice.choice([1, 2, 5, 12, 30, 60, 200])} | (
            {mask: True} if mask else {}
        )
        rows = Chat(template, RowOptions(**options))
        sample = made_up(dice)
        conversations = template.encode(sample)
        conversations = conversations[-1:] if mask == "mask_history" else conversations
        late = int(template.late_end is not None)
        sizes = [late + sum(len(turn.source) + len(turn.target) + len(turn.tail) for turn in turns) for turns in conversations]
        try:
            found = rows.encode(sample)
        except UserError:
            assert how == "error"
            assert max(sizes) > rows.options.cutoff_len
            continue
        assert sum(sizes) == sum(len(row.ids) for row in found.rows) + found.num_cut, (options, sample)
        assert all(len(row.ids) <= rows.options.cutoff_len for row in found.rows)
        assert found.num_supervised == sum(row.num_supervised for row in found.rows)
        assert all(row.num_supervised for row in found.rows)
        assert bool(found.reason) != bool(found.rows)
        assert bool(found.cut & Cut.TRAILING) == bool(sample.trailing)
        seen[how] += found.num_cut > 0
        check_learnt(found, sample, mask, tokenizer)
    assert all(count > 5 for how, count in seen.items() if how != "error"), seen


def check_learnt(found: Encoded, sample: Sample, mask: str, tokenizer: Any) -> None:
    """Labels are ids of their own place, or an end; without `train_on_prompt` they spell parts of answers that are to be learnt."""
    answers = [message.content for message in sample.messages if message.role == "assistant" and message.train is not False]
    answers = answers[-1:] if mask == "mask_history" else answers
    for row in found.rows:
        shown = row.labels != IGNORED
        odd = shown & (row.labels != row.ids)
        assert set(row.labels[odd].tolist()) <= {tokenizer.eos_token_id}
        if mask != "train_on_prompt":
            for run in runs(row.labels):
                assert any(tokenizer.decode(run).removesuffix("\n").removesuffix("<|im_end|>") in answer for answer in answers)


def test_ends_and_headers_that_are_lost(templates: dict[str, Template]) -> None:
    sample = Sample((Message("user", "a b c d e f"), Message("assistant", "g h i j k l")))
    (turn,) = templates["named"].encode(sample)[0]
    question, answer = len(turn.source), len(turn.target)

    def lost(how: str, cutoff_len: int) -> int:
        return Chat(templates["named"], RowOptions.model_validate({"truncation": how, "cutoff_len": cutoff_len})).encode(sample).cut

    whole = question + answer
    assert 2 * answer < whole - 1
    assert lost("proportional", whole) == Cut.NOTHING
    assert lost("proportional", whole - 1) == Cut.HEADER_LOST
    assert lost("proportional", 2 * answer - 1) == Cut.END_LOST | Cut.HEADER_LOST
    assert lost("keep_start", whole - 1) == Cut.END_LOST
    assert lost("keep_end", whole - 1) == Cut.HEADER_LOST
    assert lost("split", whole - 2) == Cut.END_LOST | Cut.HEADER_LOST
    assert lost("drop", whole - 1) == Cut.NOTHING


def reported(entries: dict[str, Any], rows: Any = None, packing: PackingOptions | None = None, **options: Any) -> dict[str, Any]:
    """The report of a run that dealt everything once."""
    sets = open_sets(entries, rows, packing, **options)
    for units in sets.by_name.values():
        in_order(units)
    sets.stop()
    found = ledger.report(sets.by_name)
    assert json.loads(json.dumps(found)) == found
    return found


def test_what_is_left_out_and_why(tmp_path: Path) -> None:
    lines = ['{"text": "one"}', "", "[1]", '{"text": 7}', '{"text": "two"}', "broken", '{"text": ""}', '{"other": "x"}', "null"]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, *['{"text": ""}'] * 9]))
    found = reported({"x": {"file_name": str(tmp_path / "x.jsonl"), "columns": {"prompt": "text"}}})["train"]
    line = found["data_sets"]["x"]
    assert found["complete"]
    assert (found["samples"], found["seen"]) == (17, 17)
    assert [line[key] for key in ("samples", "seen", "used", "rows", "tokens", "supervised_tokens")] == [17, 17, 2, 2, 6, 4]
    assert line["files"] == [str(tmp_path / "x.jsonl")]
    told = {reason["reason"]: (reason["samples"], reason["first"]) for reason in line["left_out"]}
    empty = told.pop("the question is empty: nothing stands in 'text'")
    assert empty == (10, [f"x.jsonl row {row} (line {row + 2})" for row in (5, 8, 9, 10, 11)])
    assert told == {
        "a record should be an object, found list": (1, ["x.jsonl row 1 (line 3)"]),
        "'text' should be text, found int": (1, ["x.jsonl row 2 (line 4)"]),
        "this line is not JSON: Expecting value (column 1)": (1, ["x.jsonl row 4 (line 6)"]),
        "there is no question: the record has neither of 'text', 'input', but 'other'": (1, ["x.jsonl row 6 (line 8)"]),
        "a record should be an object, found nothing": (1, ["x.jsonl row 7 (line 9)"]),
    }
    text = ledger.table({"train": found})
    assert "train: x: 10 left out: the question is empty: nothing stands in 'text' (x.jsonl row 5 (line 7), x.jsonl row 8" in text


def test_lengths_and_cut_tokens(tmp_path: Path) -> None:
    texts = ["x" * size for size in (2, 3, 4, 5, 6, 7, 8, 9, 40, 100)]
    entry = {"x": write_texts(tmp_path / "x.jsonl", texts)}
    line = reported(entry, letter_rows(20, truncation="keep_start"))["train"]["data_sets"]["x"]
    assert (line["tokens"], line["cut_tokens"], line["cut_samples"]) == (44 + 40, 100, 2)
    assert (line["lost_ends_of_turn"], line["lost_headers"]) == (2, 0)
    assert line["first_cut"] == ["x.jsonl row 8", "x.jsonl row 9"]
    assert line["tokens_of_a_sample"] == {"min": 2, "median": 6, "p90": 20, "p99": 20, "max": 20}
    split = reported(entry, letter_rows(20, truncation="split"))["train"]["data_sets"]["x"]
    assert (split["rows"], split["tokens"], split["cut_tokens"]) == (15, 184, 0)
    assert split["tokens_of_a_sample"]["max"] == 100
    dropped = reported(entry, letter_rows(20, truncation="drop"))["train"]["data_sets"]["x"]
    assert (dropped["used"], dropped["tokens"], dropped["cut_tokens"]) == (8, 44, 140)
    assert sum(reason["samples"] for reason in dropped["left_out"]) == 2


def test_cuts_of_conversations(make_data: MakeData, load: Load, rows_of: Callable[[Any], list[Any]]) -> None:
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "long answer " * 30}]},
        {"messages": [{"role": "user", "content": "long question " * 30}, {"role": "assistant", "content": "yes"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "tool", "content": "late"}]},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    sets = load(make_data("\n".join(map(json.dumps, records)), formatting="openai"), cutoff_len=60)
    rows = rows_of(sets.train)
    line = ledger.report(sets.by_name)["train"]["data_sets"]["x"]
    assert (line["used"], line["rows"], line["cut_samples"]) == (3, 3, 2)
    assert (line["lost_ends_of_turn"], line["lost_headers"], line["without_trailing_messages"]) == (1, 1, 1)
    assert line["first_cut"] == ["x.json row 0", "x.json row 1"]
    assert line["tokens"] == sum(len(row.ids) for row in rows)
    assert line["supervised_tokens"] == sum(row.num_supervised for row in rows)
    assert line["left_out"] == [{"reason": "the conversation ends with a question", "samples": 1, "first": ["x.json row 3"]}]
    text = ledger.table(ledger.report(sets.by_name))
    assert "2 samples cut; 1 lost an end of turn, 1 lost the header of a turn (x.json row 0, x.json row 1)" in text
    assert "samples whose last messages no answer follows, which are not read: 1" in text


def test_duplicates_and_overlap(tmp_path: Path) -> None:
    entries = {
        "a": write_texts(tmp_path / "a.jsonl", ["same", "other", "same", "", "third"]),
        "b": write_texts(tmp_path / "b.jsonl", ["same", "fourth", ""]),
        "e": write_texts(tmp_path / "e.jsonl", ["fourth", "fifth", "fifth", "other", ""]),
    }
    found = reported(entries, dataset="a, b", eval_dataset="e")
    assert found["train"]["duplicates"] == 2, "within a data set and between two"
    assert (found["eval"]["duplicates"], found["eval"]["also_in_train"]) == (1, 2)
    assert "also_in_train" not in found["train"]
    text = ledger.table(found)
    assert "train: samples that repeat another one: 2" in text
    assert "eval: samples that are in the training set, too: 2" in text
    over = reported(entries, dataset="a, b", mix_strategy="interleave_over")["train"]
    assert over["samples"] == 10
    assert over["duplicates"] == 2, "a sample that is dealt twice is no duplicate of itself"
    assert {name: line["samples"] for name, line in over["data_sets"].items()} == {"a": 5, "b": 5}
    each = reported(entries, dataset="a", eval_dataset="b, e", eval_on_each_dataset=True)
    assert (each["eval b"]["also_in_train"], each["eval e"]["also_in_train"]) == (1, 1)


def test_a_part_that_was_seen(tmp_path: Path) -> None:
    sets = open_sets({"x": write_texts(tmp_path / "x.jsonl", [f"{n:05d}" for n in range(4000)])})
    assert sets.train is not None
    sets.stop()
    found = ledger.report(sets.by_name)["train"]
    seen = found["seen"]
    assert 0 < seen < 4000
    assert not found["complete"]
    assert found["partial"] == f"{seen} of 4000 samples seen"
    assert "duplicates" not in found
    assert found["data_sets"]["x"]["tokens"] == 5 * seen
    assert f"train: partial: {seen} of 4000 samples seen" in ledger.table({"train": found})
    ledger.write(tmp_path, {"train": found})
    written = json.loads((tmp_path / ledger.FILE).read_text())
    assert written == {"complete": False, "sets": {"train": found}}


def test_how_full_packs_and_blocks_are(tmp_path: Path) -> None:
    entry = {"x": write_texts(tmp_path / "x.jsonl", ["x" * size for size in (10, 9, 9, 1, 1, 5)])}
    packs = reported(entry, letter_rows(10, kind=Answers), PackingOptions(packing=True))["train"]
    assert packs["packing"] == {"packs": 4, "capacity": 10, "fill": 0.875, "rows_see_each_other": False}
    blocks = reported(entry, letter_rows(10, whole=True), PackingOptions())["train"]
    assert blocks["packing"] == {"blocks": 4, "capacity": 10, "fill": 0.875}
    assert "train: 4 blocks of 10 tokens, 87.5% full" in ledger.table({"train": blocks})
    entry = {"x": write_texts(tmp_path / "y.jsonl", ["x" * 7, "y" * 4])}
    odd = reported(entry, letter_rows(10, whole=True), PackingOptions())["train"]
    assert odd["packing"] == {"blocks": 2, "capacity": 10, "fill": 0.55, "left_over_tokens": 1}
    assert "the last token of all stands in a block of its own" in ledger.table({"train": odd})


def test_reasons_that_are_all_unlike_are_soon_told(tmp_path: Path) -> None:
    """Each with its line, for which nobody reads the file from its beginning."""
    long = {"messages": [{"role": "user", "content": "x" * 60_000}]}
    words = ["".join(chr(97 + n // 26**place % 26) for place in range(3)) for n in range(2000)]
    records = [*[long] * 200, *[{"messages": [{"role": word, "content": "x"}]} for word in words]]
    (tmp_path / "x.json").write_text(json.dumps(records, indent=1))
    sets = open_sets({"x": {"file_name": str(tmp_path / "x.json"), "formatting": "openai"}})
    in_order(sets.train)
    sets.stop()
    began = time.monotonic()
    line = ledger.report(sets.by_name)["train"]["data_sets"]["x"]
    assert time.monotonic() - began < 5
    assert len(line["left_out"]) == 101
    assert sum(reason["samples"] for reason in line["left_out"]) == 2000
    assert (line["left_out"][-1]["reason"], line["left_out"][-1]["samples"]) == ("other reasons, each of a kind of its own", 1900)
    told = ledger.table(ledger.report(sets.by_name)).splitlines()
    assert len(told) < 30
    assert "train: x: 1,980 left out for 81 other reasons, see data_report.json" in told
    assert line["left_out"][1]["first"] == [f"x.json row 201 (line {2 + 201 * 8})"]
