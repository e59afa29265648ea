"""dataset_info.json: what an entry may say, and what is told where it says something else."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finery.data.load import DataOptions
from finery.data.registry import PACKAGED, Catalogue, default_folder, find_entry, read_catalogue
from finery.errors import UserError


def complaint(entry: Any, name: str = "x") -> str:
    """What is said about an entry."""
    with pytest.raises(UserError) as caught:
        find_entry(name, {"x": entry, "alpaca_en_demo": {"file_name": "a.json"}})
    return str(caught.value)


def catalogue(dataset_dir: str | dict[str, Any]) -> Catalogue:
    """What names may mean there."""
    found = read_catalogue(dataset_dir, None)
    assert found is not None
    return found


def findings(run_ranking: bool = False, **options: Any) -> list[str]:
    """What `check` says about data keys."""
    run = SimpleNamespace(method=SimpleNamespace(ranking=run_ranking, reads=()))
    return [f"{finding.key}: {finding.text}" for finding in DataOptions(**options).check(run)]


def test_unknown_name_with_a_hint() -> None:
    assert "did you mean 'alpaca_en_demo'?" in complaint({}, "alpaca_en_dmo")
    assert "it knows: alpaca_en_demo, x" in complaint({}, "quite different")


def test_unknown_key_with_a_hint() -> None:
    assert "did you mean 'file_name'?" in complaint({"file_nam": "x.json"})
    assert "columns.promt" in (told := complaint({"file_name": "x.json", "columns": {"promt": "q"}}))
    assert "did you mean 'prompt'?" in told


def test_every_fault_of_an_entry_is_told() -> None:
    told = complaint({"file_name": "x.json", "num_samples": 0, "ranking": "perhaps"})
    assert "num_samples" in told
    assert "ranking" in told


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("x.json", "should be an object"),
        ({}, "names no file and no hub"),
        ({"file_name": "x.json", "formatting": "alpacca"}, "alpaca"),
        ({"file_name": "x.json", "split": "train[10]"}, "a part of it such as train[:10%] or train[100:200], found 'train[10]'"),
        ({"file_name": "x.json", "split": "train+test"}, "should be a split's name, or a part of it"),
        ({"file_name": "x.json", "split": "train[:1.5%]"}, "should be a split's name, or a part of it"),
        ({"script_url": "x"}, "'script_url' names a program that loads data, which Finery does not run; convert the data once"),
        ({"file_name": "x.json", "num_samples": 0}, "num_samples should be greater than 0, found 0"),
    ],
)
def test_entries_that_cannot_be_used(entry: Any, words: str) -> None:
    assert words in complaint(entry)


def test_columns_and_tags_are_merged_with_the_defaults() -> None:
    entry = find_entry("x", {"x": {"file_name": "x.json", "columns": {"prompt": "q"}, "tags": {"user_tag": "user"}}})
    assert (entry.columns.prompt, entry.columns.query, entry.columns.response, entry.columns.history) == ("q", "input", "output", None)
    assert (entry.tags.user_tag, entry.tags.assistant_tag, entry.tags.role_tag, entry.tags.system_tag) == ("user", "gpt", "from", "system")


@pytest.mark.parametrize(
    "entry",
    [
        {"file_name": "x.json", "split": "train[:10%]"},
        {"file_name": "x.json", "split": "train[100:-1]"},
        {"file_name": "x.json", "script_url": "x"},  # whoever has the file needs no program
        {"cloud_file_name": "s3://x"},
        {"hf_hub_url": "a/b", "subset": "de", "split": "validation", "folder": "en"},
        {"file_name": "x.json", "file_sha1": "0"},  # older files have checksums
    ],
)
def test_entries_that_can_be_used(entry: dict[str, Any]) -> None:
    found = find_entry("x", {"x": entry})
    assert all(getattr(found, key) == value for key, value in entry.items() if key != "file_sha1")


BOTH = {"hf_hub_url": "hf/name", "ms_hub_url": "ms/name", "file_name": "x.json"}


@pytest.mark.parametrize(
    ("variable", "entry", "hub"),
    [
        ("", BOTH, ("hf", "hf/name")),
        ("USE_MODELSCOPE_HUB", BOTH, ("ms", "ms/name")),
        ("USE_OPENMIND_HUB", BOTH, ("hf", "hf/name")),
        ("USE_OPENMIND_HUB", BOTH | {"om_hub_url": "om/name"}, ("om", "om/name")),
        ("", {"ms_hub_url": "ms/name"}, ("ms", "ms/name")),
        ("USE_MODELSCOPE_HUB", {"hf_hub_url": "hf/name"}, ("hf", "hf/name")),
        ("USE_MODELSCOPE_HUB", {"file_name": "x.json"}, None),
    ],
)
def test_the_environment_chooses_the_hub(monkeypatch: pytest.MonkeyPatch, variable: str, entry: dict[str, str], hub: Any) -> None:
    for other in ("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB"):
        monkeypatch.delenv(other, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    assert find_entry("x", {"x": entry}).hub == hub


def test_data_falls_back_to_the_packaged_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_folder("data") == PACKAGED
    assert "identity" in catalogue("data").entries
    assert default_folder("other") == Path("other")
    (tmp_path / "data").mkdir()
    assert default_folder("data") == PACKAGED  # a container's empty volume
    (tmp_path / "data" / "mine.json").write_text("[]")
    assert default_folder("data") == Path("data")


def test_a_dict_is_a_registry(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[]")
    registry = {"x": {"file_name": str(path)}}
    assert catalogue(registry) == Catalogue(registry)
    assert findings(dataset="x", dataset_dir=registry) == []


def test_trouble_with_the_file_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "dataset_info.json"
    with pytest.raises(UserError, match=r"there is no .*dataset_info\.json"):
        catalogue(str(tmp_path)).entry("x")
    path.write_text('{\n "a": {},\n "b" 1\n}')
    with pytest.raises(UserError, match=r"dataset_info\.json:3: this is not JSON"):
        catalogue(str(tmp_path))
    path.write_text("[1]")
    with pytest.raises(UserError, match="should hold an object of entries, found a list"):
        catalogue(str(tmp_path))
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match="is not UTF-8"):
        catalogue(str(tmp_path))
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": {}}).encode())
    assert catalogue(str(tmp_path)) == Catalogue({"a": {}}, tmp_path)


def test_a_path_needs_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the working folder or from `dataset_dir`; a name in the registry comes first."""
    (tmp_path / "data").mkdir()
    for name in ("here.jsonl", "data/there.jsonl", "data/known"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = catalogue("data")
    for name in ("here.jsonl", "there.jsonl", "*.jsonl", "data", str(tmp_path / "here.jsonl")):
        assert found.entry(name) is None
        assert findings(dataset=name) == []
    with pytest.raises(UserError, match=r"there is no such file or folder, and dataset_info\.json has none of this name"):
        found.entry("data/gone.jsonl")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"known": {"file_name": "there.jsonl"}}))
    assert (entry := catalogue("data").entry("known")) is not None
    assert entry.file_name == "there.jsonl"


@pytest.mark.parametrize(("variable", "hub"), [("", "hf"), ("USE_MODELSCOPE_HUB", "ms"), ("USE_OPENMIND_HUB", "om")])
def test_names_of_a_hub(monkeypatch: pytest.MonkeyPatch, variable: str, hub: str) -> None:
    for other in ("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB"):
        monkeypatch.delenv(other, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    assert (entry := catalogue("ONLINE").entry("somebody/something")) is not None
    assert (entry.hub, entry.formatting, entry.split) == ((hub, "somebody/something"), "alpaca", "train")
    assert read_catalogue("REMOTE: somebody/registry", None) is None, "what lies on a hub is read when the run begins"
    assert findings(dataset="whatever", dataset_dir="REMOTE:somebody/registry") == []


def test_ranking_must_fit_the_stage(data_dir: Path) -> None:
    entries = {"x": {"file_name": str(data_dir / "sums.json"), "ranking": True}, "y": {"file_name": str(data_dir / "sums.json")}}
    (told,) = findings(dataset="x, y", dataset_dir=entries)
    assert "'x' with 'ranking: true', but this stage learns from plain answers" in told
    (told,) = findings(run_ranking=True, dataset="x, y", dataset_dir=entries)
    assert "'y' with 'ranking: false', but this stage learns from pairs" in told


def test_contradictions_of_the_data_keys(data_dir: Path) -> None:
    base: dict[str, Any] = {"dataset": "sums", "dataset_dir": str(data_dir)}
    assert findings(**base) == []
    (told,) = findings(**base, eval_dataset="names", val_size=0.1)
    assert "exclude each other" in told
    (told,) = findings(**base, val_size=2.5)
    assert "whole number or a fraction" in told
    (told,) = findings(val_size=0.1)
    assert "not given" in told
    (told,) = findings(dataset="sums, sums", dataset_dir=str(data_dir))
    assert "twice" in told


def test_mixing_is_checked(data_dir: Path) -> None:
    base: dict[str, Any] = {"dataset": "sums, names", "dataset_dir": str(data_dir), "mix_strategy": "interleave_over"}
    assert findings(**base) == findings(**base, interleave_probs="0.7, 0.3") == findings(**base, interleave_probs=[3, 1]) == []
    concat: dict[str, Any] = base | {"mix_strategy": "concat"}
    (told,) = findings(**concat, interleave_probs=[0.7, 0.3])
    assert told == "interleave_probs: weighs data sets that are interleaved, but 'mix_strategy' is concat"
    (told,) = findings(**base, interleave_probs=[1, 2, 3])
    assert told == "interleave_probs: should have a weight for each of 2 names in 'dataset', found 3"
    for weights in ([0, 0], [1, -1]):
        (told,) = findings(**base, interleave_probs=weights)
        assert "should be weights of 0 or more, not all 0" in told
    evaluated: dict[str, Any] = base | {"dataset": "sums", "eval_dataset": "sums, names", "interleave_probs": [1, 2, 3]}
    assert [told.partition(",")[0] for told in findings(**evaluated)] == [
        "interleave_probs: should have a weight for each of 2 names in 'eval_dataset'"
    ]
    assert findings(**evaluated, eval_on_each_dataset=True) == []


def test_columns_that_a_stage_does_not_read_are_refused(data_dir: Path) -> None:
    entries = {"x": {"file_name": str(data_dir / "sums.json"), "columns": {"images": "pictures"}}}
    (told,) = findings(dataset="x", dataset_dir=entries)
    assert told == "dataset: names 'x', which has a column for 'images' that this stage does not read; take it out of the columns"


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    (told,) = findings(dataset="x", dataset_dir={"x": {"file_name": str(tmp_path / "none.json")}})
    assert "none.json" in told
    assert "does not exist" in told
