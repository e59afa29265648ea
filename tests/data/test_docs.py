"""docs/data.md and docs/data_zh.md: every example is really loaded, every number computed, every key named, and both pages say the same."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from finery.cli import main
from finery.data import ledger
from finery.data.formats.base import Columns, Tags
from finery.data.jinja import JinjaTemplate
from finery.data.load import DataOptions, Preparation, Sets, load_rows, load_sets
from finery.data.mixing import Mixture, Selection
from finery.data.packing import PackingOptions
from finery.data.registry import Catalogue, DatasetEntry
from finery.data.rows.base import Row, RowOptions
from finery.data.rows.chat import share
from finery.data.sample import Sample
from finery.data.sources import open_source
from finery.errors import UserError
from finery.methods import METHODS
from finery.previews.rows import Shown
from finery.training.arguments import LoopOptions
from finery.training.preparation import token_key

Load = Callable[..., Sets]
RowsOf = Callable[[Any], list[Row]]

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("data.md", "data_zh.md")
PAGE, TRANSLATION = ((DOCS / name).read_text(encoding="utf-8") for name in PAGES)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = r"`(\w+\.\w+)`:\n\n```\w+\n(.*?)^```$"
EXAMPLE = re.compile(FILE + r"\n\n`dataset_info.json`:\n\n```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {Path(file).stem: (file, content, json.loads(entry)) for file, content, entry in EXAMPLE.findall(PAGE)}
"""File, what it holds, and its dataset_info.json, by the data set's name."""
OWN = (DatasetEntry, Columns, Tags, DataOptions, RowOptions, PackingOptions)

LEARNT = {
    "translate": [["Bonjour", "Bonne nuit"], ["Merci"]],
    "capitals": [["Lima"], ["Laos"]],
    "parcels": [["It arrives today."]],
    "trains": [["call find_train Oslo", "The next one leaves at 10:40."]],
    "support": [["think That takes two tools. call weather Oslo call clock", "It rains, and it is 10:40."], ["Hello! How can I help?"]],
}
"""Of each example for supervised training, the learnt texts of each sample, as `TEMPLATE` writes them."""
READ = {
    "translate": [
        ["system:You are terse.;", "user:Translate to French: Hello;", "user:Translate to French.\nGood night;"],
        ["\nThank you;"],
    ],
    "capitals": [["What is the capital of Peru?"], ["Which is larger, Laos or Cuba?"]],
    "parcels": [["user:Where is my parcel?;"]],
    "trains": [["tools find_train", "system:Use the tools.;", "leave for Oslo?", 'tool:{"next": "10:40"};']],
    "support": [
        ["tools weather clock", "system:Be brief.;", "What is the weather in Oslo, and how late is it?", "tool:rain;\ntool:10:40;"],
        ["user:Hi;", "assistant:What?"],
    ],
}
"""Texts that stand in these rows beside what is learnt."""
TEXTS = {
    "articles": ["The Rhine rises in the Alps and flows to the North Sea.", "The Nile flows north."],
    "sayings": ["Well begun is half done.", "Still waters run deep."],
}
PAIRS = {
    "better": [("Name a prime number.", "Seven.", "Nine."), ("Is the earth flat?", "No, it is round.", "Yes.")],
    "tone": [("You are late!", "I am sorry.", "So what?")],
    "polite": [("Wait!", "Of course.", "No.")],
}
LABELS = {
    "liked": [("Name a prime number.", "Seven.", True), ("Name a prime number.", "Nine.", False)],
    "rated": [("You are late!", "I am sorry.", True), ("You are late!", "So what?", False)],
}
TEMPLATE = (
    "{% if tools %}<|im_start|>tools{% for tool in tools %}{{ ' ' + tool['function']['name'] }}{% endfor %};<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}:"
    "{% if message['reasoning_content'] %}think {{ message['reasoning_content'] }} {% endif %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{% if not loop.first %} {% endif %}call {{ call['function']['name'] }}"
    "{% for value in call['function']['arguments'].values() %} {{ value }}{% endfor %}{% endfor %}"
    "{% if message['role'] != 'assistant' %};{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
"""Writes tools, calls, results and thoughts, as the tiny model's own template does not."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All examples of the page in the working folder, and an empty cache."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for file, content in re.findall(FILE, PAGE, re.MULTILINE | re.DOTALL):
        if file != "dataset_info.json":
            (tmp_path / file).write_text(content, encoding="utf-8")
    return tmp_path


def samples(name: str, catalogue: Catalogue) -> list[Sample]:
    """All samples of a data set."""
    source = open_source(name, catalogue, {"cache_dir": None, "tokens": {}}, {}, {}, tells=False)
    return [source.sample(row) for row in range(len(source))]


def by_entry(name: str) -> list[Sample]:
    """The samples of an example by its dataset_info.json."""
    return samples(name, Catalogue(EXAMPLES[name][2], Path()))


def test_every_example_is_tried() -> None:
    assert EXAMPLES.keys() == LEARNT.keys() | TEXTS.keys() | PAIRS.keys() | LABELS.keys()
    captions = {file for file, _ in re.findall(FILE, PAGE, re.MULTILINE | re.DOTALL)}
    assert captions == {file for file, _, _ in EXAMPLES.values()} | {"dataset_info.json", "questions.jsonl"}
    for name, (file, _, entries) in EXAMPLES.items():
        assert entries.keys() == {name}
        assert entries[name]["file_name"] == file


@pytest.mark.parametrize("name", LEARNT)
def test_answers_are_learnt(load: Load, rows_of: RowsOf, tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = TEMPLATE
    train = load(EXAMPLES[name][2], dataset=name, cutoff_len=1000).train
    assert train is not None
    rows = rows_of(train)
    assert len(train) == len(rows) == len(LEARNT[name])
    for row, learnt, read in zip(rows, LEARNT[name], READ[name], strict=True):
        text = tokenizer.decode(row.ids).replace("<|im_start|>", "").replace("<|im_end|>", "")
        assert all(part in text for part in read), text
        assert tokenizer.decode(row.labels[row.labels >= 0]).split("<|im_end|>")[:-1] == learnt


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_learnt_whole(load: Load, rows_of: RowsOf, tokenizer: Any, name: str) -> None:
    rows = rows_of(load(EXAMPLES[name][2], dataset=name, stage="pt", packing=False).train)
    assert [tokenizer.decode(row.labels) for row in rows] == [f"{text}<|im_end|>" for text in TEXTS[name]]
    (block,) = rows_of(load(EXAMPLES[name][2], dataset=name, stage="pt").train)
    assert tokenizer.decode(block.labels) == "".join(f"{text}<|im_end|>" for text in TEXTS[name])


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    found = by_entry(name)
    assert all(sample.chosen and sample.rejected for sample in found)
    texts = [(one.messages[-1].content, one.chosen and one.chosen.content, one.rejected and one.rejected.content) for one in found]
    assert texts == PAIRS[name]


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    found = by_entry(name)
    assert [(*(message.content for message in sample.messages), sample.desirable) for sample in found] == LABELS[name]


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"parcels"}))
def test_a_path_alone_means_the_same(name: str) -> None:
    one, other = ([replace(each, unanswered="") for each in found] for found in (samples(EXAMPLES[name][0], Catalogue()), by_entry(name)))
    assert one == other


def test_names_that_nobody_could_guess() -> None:
    with pytest.raises(UserError, match="format cannot be told"):
        samples("parcels.jsonl", Catalogue())


def test_the_same_in_parquet(folder: Path) -> None:
    records = json.loads((folder / "translate.json").read_text(encoding="utf-8"))
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), folder / "translate.parquet")
    entry = EXAMPLES["translate"][2]["translate"] | {"file_name": "translate.parquet"}
    assert samples("t", Catalogue({"t": entry}, folder)) == by_entry("translate")


def test_the_ledger_is_what_a_run_says(real_model: Path) -> None:
    from transformers import AutoTokenizer

    method = METHODS["sft"](METHODS["sft"].Options())
    template = JinjaTemplate(AutoTokenizer.from_pretrained(str(real_model)))
    rows = load_rows("chat", template, RowOptions(cutoff_len=56), PackingOptions())
    prepared = Preparation(rows, method, token_key(rows), 42, {"cache_dir": None, "tokens": {}})
    sets = load_sets(DataOptions.model_validate({"dataset": "questions.jsonl"}), PackingOptions(), prepared)
    try:
        assert sets.train is not None
        sets.train.samples.encode_all()
        found = ledger.report(sets.by_name)
    finally:
        sets.stop()
    assert ledger.table(found) == block_with("longest").rstrip()
    ledger.write(Path(), found)
    assert json.loads(Path("data_report.json").read_text(encoding="utf-8")) == json.loads(block_with("supervised_tokens"))


def test_check_says_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "questions.jsonl"]) == 1
    printed, said = (re.sub(r"in \d+\.\d s", "in … s", text) for text in (capsys.readouterr().out, block_with("6 rows in")))
    assert printed == said


def test_fields_of_show_and_check(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    fields = Shown({"dataset": "x"}, [row]).as_dict()
    main(["check", "questions.jsonl", "--json"])
    told = json.loads(capsys.readouterr().out)
    missing = [field for field in (*fields, *told, *told["findings"][0]) if f"`{field}`" not in PAGE]
    assert not missing


def test_mixing_is_as_the_table_says() -> None:
    lines = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d ]+) \|$", PAGE, re.MULTILINE)
    assert [strategy for strategy, _ in lines] == ["concat", "interleave_under", "interleave_over", "interleave_once"]
    values = ([1, 2, 3], [10, 11, 12, 13, 14, 15])
    for strategy, said in lines:
        mixture = Mixture([Selection(0, len(each)) for each in values], strategy)
        sources, rows = mixture.locate(np.arange(len(mixture)))
        assert [values[source][row] for source, row in zip(sources, rows, strict=True)] == [int(word) for word in said.split()], strategy


def test_cutting_is_as_the_table_says() -> None:
    lines = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        question, answer, *kept = map(int, line)
        assert share(question, answer, 2048) == tuple(kept)


@pytest.mark.parametrize("page", [PAGE, TRANSLATION], ids=PAGES)
def test_every_key_is_named(page: str) -> None:
    words = {word for code in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"\w+", code)}
    missing = [f"{group.__name__}.{name}" for group in OWN for name in group.model_fields if name not in words]
    assert not missing


@pytest.mark.parametrize("page", [PAGE, TRANSLATION], ids=PAGES)
def test_settings_are_real(page: str) -> None:
    for text in settings(page):
        known = {name: group for group in (DataOptions, RowOptions, PackingOptions, LoopOptions) for name in group.model_fields}
        for key, value in text.items():
            known[key].model_validate({key: value})


def settings(page: str) -> Iterator[Mapping[str, Any]]:
    """The blocks of YAML."""
    yield from (yaml.safe_load(text) for kind, text in BLOCK.findall(page) if kind == "yaml")


def block_with(word: str) -> str:
    """The first block of a page that holds a word."""
    return next(text for _, text in BLOCK.findall(PAGE) if word in text)


def test_both_pages_have_the_same_blocks() -> None:
    assert BLOCK.findall(TRANSLATION) == BLOCK.findall(PAGE)


def sections(page: str) -> list[str]:
    """The page cut at its headings, blocks left out."""
    return re.split(r"^#+ .*$", BLOCK.sub("", page), flags=re.MULTILINE)


def test_both_pages_say_the_same() -> None:
    """As far as a machine can see: the same headings, and in each section as many lines of tables and lists, the same words of code."""
    assert re.findall(r"^#+ ", TRANSLATION, re.MULTILINE) == re.findall(r"^#+ ", PAGE, re.MULTILINE)
    for number, (one, other) in enumerate(zip(sections(PAGE), sections(TRANSLATION), strict=True)):
        for mark in ("|", "- "):
            count = [sum(line.startswith(mark) for line in text.splitlines()) for text in (one, other)]
            assert count[0] == count[1], f"section {number}"
        words = [{word for word in re.findall(r"`([^`\n]+)`", text) if word.isascii()} for text in (one, other)]
        assert words[0] == words[1], f"section {number}: {words[0] ^ words[1]}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    headings = [re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    for target in re.findall(r"\]\((\S+)\)", text):
        assert target[1:] in headings if target.startswith("#") else (DOCS / target).exists(), target
