"""Which files a data set has: paths, folders, patterns, hubs with their cards, clouds, and parts of a split."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fake_hub import FakeHub, serving
from finery.data.files import find_files, hub_files, local_files
from finery.data.load import Sets
from finery.data.registry import Catalogue, DatasetEntry, read_catalogue
from finery.errors import UserError
from letters import in_order, open_sets, write_texts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for every test, and the test's folder as the working folder."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    """Make files in the working folder."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("content of " + name)


def told(paths: list[Path], base: Path | None = None) -> list[str]:
    """Paths as one writes them."""
    return [str(path.relative_to(base or Path())) for path in paths]


def test_a_file_a_folder_and_a_pattern(tmp_path: Path) -> None:
    touch("d/b.jsonl", "d/a.json", "d/c.parquet", "d/e.csv.gz", "d/f.txt.zst", "d/README.md", "d/dataset_info.json", "d/.hidden.json")
    touch("d/sub/z.json", "d/dataset_infos.json", "d/note.gz", "x[1].json")
    assert told(local_files("d/a.json")) == ["d/a.json"]
    assert told(local_files("d/.hidden.json")) == ["d/.hidden.json"], "whoever names it means it"
    assert told(local_files("d")) == ["d/a.json", "d/b.jsonl", "d/c.parquet", "d/e.csv.gz", "d/f.txt.zst"]
    assert told(local_files("d/*.json*")) == ["d/a.json", "d/b.jsonl"]
    assert told(local_files("d/[ab].json*")) == ["d/a.json", "d/b.jsonl"]
    assert told(local_files(str(tmp_path / "**" / "*.json")), tmp_path) == ["d/a.json", "d/sub/z.json", "x[1].json"]
    assert told(local_files("x[1].json")) == ["x[1].json"]
    assert Catalogue(folder=Path("d")).path("x[1].json") == "x[1].json"


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("none.json", "none.json does not exist; a data set's file should end in .arrow, .csv, .json, .jsonl, .parquet, .txt, also with"),
        ("none*.json", "none*.json does not exist"),
        ("empty", "empty holds no file that ends in .arrow, .csv, .json"),
        ("d/x.docx", "d/x.docx should end in one of .arrow, .csv"),
        ("d/x.gz", "d/x.gz should end in one of .arrow, .csv"),
        ("d/*", "d/x.docx should end in one of .arrow, .csv"),
    ],
)
def test_paths_that_are_no_data(pattern: str, words: str) -> None:
    touch("d/x.docx", "d/y.json", "d/x.gz", "empty/README.md")
    with pytest.raises(UserError) as error:
        local_files(pattern)
    assert str(error.value).startswith(words)


def loaded(sets: Sets) -> list[str]:
    """The texts of the training set, in the order of the files."""
    try:
        return in_order(sets.train)
    finally:
        sets.stop()


def test_files_of_a_folder_are_one_data_set_in_the_order_of_names() -> None:
    write_texts(Path("data/parts/b.jsonl"), ["b0", "b1"])
    Path("data/parts/a.json").write_text(json.dumps([{"text": "a0"}, {"text": "a1"}]))
    Path("data/parts/c.csv").write_text("text\nc0\n")
    Path("data/parts/c.txt").write_text("d0\nd1")
    Path("data/dataset_info.json").write_text(json.dumps({"x": {"file_name": "parts", "columns": {"prompt": "text"}}}))
    whole = ["a0", "a1", "b0", "b1", "c0", "d0", "d1"]
    assert loaded(open_sets({}, dataset="x", dataset_dir="data")) == whole
    entry = {"file_name": "data/parts", "columns": {"prompt": "text"}}
    assert loaded(open_sets({"x": entry})) == whole
    assert loaded(open_sets({"x": entry | {"file_name": "data", "folder": "parts"}})) == whole
    assert loaded(open_sets({"x": entry | {"file_name": "data/parts/*.c*", "split": "train[0:1]"}})) == ["c0"]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", range(30)),
        ("train[:10%]", range(3)),
        ("train[5:]", range(5, 30)),
        ("train[-3:]", range(27, 30)),
        ("train[:-28]", range(2)),
        ("train[10%:20%]", range(3, 6)),
        ("train[-10%:]", range(27, 30)),
        ("train[5:50%]", range(2, 15)),  # a percent sign is for both
        ("train[28:99]", range(28, 30)),
        ("train[:]", range(30)),
        ("train[:5%]", range(2)),  # of 1.5 rows, as `datasets` rounds
        ("train[15%:35%]", range(4, 10)),  # 4.5 and 10.5
    ],
)
def test_parts_of_a_split(split: str, rows: range) -> None:
    """Over all files together."""
    texts = [f"text {n}" for n in range(30)]
    write_texts(Path("d/a.jsonl"), texts[:12])
    write_texts(Path("d/b.jsonl"), texts[12:])
    entry = {"file_name": "d", "columns": {"prompt": "text"}, "split": split}
    assert loaded(open_sets({"x": entry})) == [texts[row] for row in rows]
    from datasets import Dataset, ReadInstruction  # what the slices mean

    theirs = ReadInstruction.from_spec(split).to_absolute({"train": 30})[0]
    assert list(Dataset.from_dict({"row": range(30)})["row"][theirs.from_ : theirs.to]) == list(rows)


def test_an_empty_part_and_a_part_that_is_none() -> None:
    entry = write_texts(Path("x.jsonl"), ["a", "b"])
    with pytest.raises(UserError, match=r"data set 'x': its split 'train\[2:\]' holds no records"):
        open_sets({"x": entry | {"split": "train[2:]"}})
    for split in ("train[a:]", "train[1]", "train+test", "train[:10", "[5:]"):
        with pytest.raises(UserError, match="split should be a split's name, or a part of it such as"):
            open_sets({"x": entry | {"split": split}})


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: ["one/*.jsonl", two/b.json]
  - split: test
    path: held/*.csv
- config_name: single
  data_files: one/a.jsonl
- config_name: list
  data_dir: two
  data_files: ["b.json", "*.parquet"]
- config_name: packed
  data_files: {split: train, path: "**/*.gz"}
- config_name: image
  data_files: "*.png"
---
# A data set
"""


@pytest.fixture
def snapshot() -> Path:
    """A hub's snapshot with a card."""
    touch("hub/one/a.jsonl", "hub/one/c.jsonl", "hub/two/b.json", "hub/two/p.parquet", "hub/held/t.csv", "hub/other.json", "hub/x/y.txt.gz")
    touch("hub/.cache/z.json", "hub/two/.z.json", "hub/pic.png")
    Path("hub/README.md").write_text(CARD)
    return Path("hub")


def of_hub(snapshot: Path, **entry: Any) -> list[str]:
    """The files of a hub's entry, found in a local folder as in its snapshot."""
    found = find_files("x", DatasetEntry(**{"hf_hub_url": str(snapshot.absolute()), **entry}), None, {})
    return told(found, snapshot.absolute())


def test_the_card_says_which_files(snapshot: Path) -> None:
    assert of_hub(snapshot) == ["one/a.jsonl", "one/c.jsonl", "two/b.json"]
    assert of_hub(snapshot, subset="default", split="train[:5]") == ["one/a.jsonl", "one/c.jsonl", "two/b.json"]
    assert of_hub(snapshot, split="test") == ["held/t.csv"]
    assert of_hub(snapshot, subset="single") == ["one/a.jsonl"]
    assert of_hub(snapshot, subset="packed") == ["x/y.txt.gz"]
    assert of_hub(snapshot, subset="list") == ["two/b.json", "two/p.parquet"]
    for entry, words in (
        ({"split": "dev"}, "there is no split 'dev'; its card lists train, test"),
        ({"subset": "single", "split": "test"}, "there is no split 'test'; its card lists train"),
        ({"subset": "none"}, "there is no subset 'none'; its card lists default, single, list, packed, image"),
    ):
        with pytest.raises(UserError) as error:
            of_hub(snapshot, **entry)
        assert str(error.value) == f"data set 'x': {words}"


@pytest.mark.parametrize(
    "card",
    [
        "# Nothing",
        "---\nlicense: mit\n---\n",
        "---\n: [broken\n---\n",
        "---\nconfigs: 3\n---\n",
        "---\n- a\n---\n",
        "---\nconfigs:\n- config_name: default\n  data_files: /absolute/*.json\n---\n",
        "---\nconfigs:\n- config_name: default\n  data_files: ''\n---\n",
        "---\nconfigs:\n- config_name: default\n  data_files: [{path: none.json}, {path: {a: 1}}]\n---\n",
        "---\nconfigs:\n- config_name: default\n  data_files: [{split: train}]\n---\n",
        "---\nconfigs:\n- config_name: default\n  data_files: [3]\n---\n",
    ],
)
def test_a_card_that_says_nothing_useful(card: str) -> None:
    """Then the names of files and folders tell."""
    touch("hub/data/train-00000.json", "hub/data/test-00000.json")
    Path("hub/README.md").write_text(card)
    assert of_hub(Path("hub")) == ["data/train-00000.json"]


def test_names_say_split_and_subset() -> None:
    touch("hub/en/train.json", "hub/en/validation.json", "hub/fr/train-00000-of-00002.json", "hub/fr/train-00001-of-00002.json")
    hub = Path("hub")
    assert of_hub(hub, subset="fr") == ["fr/train-00000-of-00002.json", "fr/train-00001-of-00002.json"]
    assert of_hub(hub, subset="en", split="validation") == ["en/validation.json"]
    assert of_hub(hub, folder="en") == ["en/train.json"]
    for entry, words in (
        ({"subset": "de"}, "is named for the subset 'de'"),
        ({"subset": "fr", "split": "test"}, "is named for the split 'test'"),
        ({"folder": "none"}, "holds no file that ends in"),
    ):
        with pytest.raises(UserError, match=words):
            of_hub(hub, **entry)
    touch("flat/all.jsonl", "flat/deep/more.jsonl", "flat/restraint.jsonl")
    assert told(hub_files("x", Path("flat"), DatasetEntry.model_validate({"hf_hub_url": "a/b"})), Path("flat")) == [
        "all.jsonl",
        "restraint.jsonl",
    ]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub on this machine."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._headers.detect_agent", lambda: None)
    hub = FakeHub()
    with serving(hub, monkeypatch):
        yield hub


def given(tmp_path: Path) -> dict[str, Any]:
    """Where downloads go."""
    return {"cache_dir": str(tmp_path / "hub cache")}


def test_any_name_is_a_hubs_with_online(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("datasets/org/data", "main", {"data.json": b'[{"instruction": "Hi", "output": "Hello"}]', "README.md": b"# x"})
    catalogue = read_catalogue("ONLINE", given(tmp_path))
    assert catalogue is not None
    entry = catalogue.entry("org/data")
    assert entry is not None
    assert (entry.hub, entry.formatting) == (("hf", "org/data"), "alpaca")
    (path,) = find_files("org/data", entry, None, given(tmp_path))
    assert json.loads(path.read_bytes())[0]["output"] == "Hello"
    with pytest.raises(UserError, match="it has no such dataset, or it is private"):
        find_files("org/none", DatasetEntry.model_validate({"hf_hub_url": "org/none"}), None, given(tmp_path))


def test_a_registry_on_a_hub(fake: FakeHub, tmp_path: Path) -> None:
    """Its entries may name files beside it, and other data sets."""
    registry = {"near": {"file_name": "near.json"}, "far": {"hf_hub_url": "org/data"}}
    fake.add("datasets/org/registry", "main", {"dataset_info.json": json.dumps(registry).encode(), "near.json": b"[]"})
    fake.add("datasets/org/data", "main", {"data.json": b"[1]"})
    assert read_catalogue("REMOTE:org/registry", None) is None, "nothing is fetched before the run begins"
    catalogue = read_catalogue("REMOTE: org/registry", given(tmp_path))
    assert catalogue is not None
    found = {}
    for name in registry:
        entry = catalogue.entry(name)
        assert entry is not None
        (path,) = find_files(name, entry, catalogue.folder, given(tmp_path))
        found[name] = path.read_bytes()
    assert found == {"near": b"[]", "far": b"[1]"}
    fake.add("datasets/org/bare", "main", {"data.json": b"[1]"})
    with pytest.raises(UserError, match=r"dataset_info\.json cannot be read: No such file"):
        read_catalogue("REMOTE:org/bare", given(tmp_path))


def cloud(address: str) -> list[Path]:
    """The files at an address."""
    return find_files("x", DatasetEntry.model_validate({"cloud_file_name": address}), None, {})


@pytest.mark.parametrize("scheme", ["memory://{}", "file://{}"])
def test_a_cloud_file_is_kept_until_it_changes(scheme: str, tmp_path: Path) -> None:
    address = scheme.format(tmp_path / "bucket" / "x.jsonl")

    def put(content: bytes) -> None:
        with fsspec.open(address, "wb", auto_mkdir=True) as file:
            file.write(content)  # type: ignore[union-attr]

    put(b'{"text": "old"}\n')
    (path,) = cloud(address)
    assert path.name == "x.jsonl"
    assert path.read_bytes() == b'{"text": "old"}\n'
    path.write_bytes(b"kept")
    assert cloud(address)[0].read_bytes() == b"kept", "not fetched again"
    put(b'{"text": "newer"}\n')
    assert cloud(address)[0].read_bytes() == b'{"text": "newer"}\n'


def test_a_cloud_folder_and_what_is_not_there(tmp_path: Path) -> None:
    touch("bucket/b.json", "bucket/a.jsonl.gz", "bucket/README.md", "bucket/deep/c.json", "bare/x.md")
    assert [path.name for path in cloud(f"file://{tmp_path}/bucket")] == ["a.jsonl.gz", "b.json"]
    for address, words in (
        (f"file://{tmp_path}/none.json", "cannot be read: [Errno 2] No such file"),
        (f"file://{tmp_path}/bare", "holds no file that ends in"),
        ("memory://nowhere/x.json", "cannot be read: /nowhere/x.json"),
        ("zzz://bucket/x.json", "cannot be used: Protocol not known: zzz"),
    ):
        with pytest.raises(UserError) as error:
            cloud(address)
        assert str(error.value).startswith("data set 'x': ")
        assert words in str(error.value)


def test_a_path_in_place_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Seen from the working folder or from `dataset_dir`; the records tell the format, which is said."""
    write_texts(Path("here/a.jsonl"), ["one", "two"])
    write_texts(Path("data/there.jsonl"), ["three"])
    Path("data/dataset_info.json").write_text('{"known": {"file_name": "there.jsonl", "columns": {"prompt": "text"}}}')
    names = "here/a.jsonl, there.jsonl, here, ./here/*.jsonl, known"
    assert loaded(open_sets({}, dataset=names, dataset_dir="data")) == ["one", "two", "three", "one", "two", "one", "two", "three"]
    assert "data set here/a.jsonl: read as alpaca: plain text in column 'text'" in capsys.readouterr().err
    assert loaded(open_sets({}, dataset=str(Path("here").absolute()), dataset_dir="nowhere")) == ["one", "two"]
    for name, words in (
        ("here/b.jsonl", "data set 'here/b.jsonl': there is no such file or folder, and dataset_info.json has none of this name"),
        ("knwon", "data set 'knwon': dataset_info.json has none of this name; did you mean 'known'?"),
    ):
        with pytest.raises(UserError) as error:
            open_sets({}, dataset=name, dataset_dir="data")
        assert str(error.value) == words


def test_programs_that_load_data_are_not_run() -> None:
    entry = write_texts(Path("x.jsonl"), ["a"]) | {"script_url": "loader"}
    assert loaded(open_sets({"x": entry})) == ["a"]
    with pytest.raises(UserError, match=r"'script_url' names a program that loads data, which Finery does not run; convert the data once"):
        open_sets({"x": {"script_url": "loader"}})
