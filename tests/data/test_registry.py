"""dataset_info.json: what an entry may say, and what is told where it says something else."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finery.data.load import DataOptions
from finery.data.registry import PACKAGED, default_folder, find_entry, read_registry
from finery.errors import UserError


def complaint(entry: Any, name: str = "x") -> str:
    """What is said about an entry."""
    with pytest.raises(UserError) as caught:
        find_entry(name, {"x": entry, "alpaca_en_demo": {"file_name": "a.json"}})
    return str(caught.value)


def findings(run_ranking: bool = False, **options: Any) -> list[str]:
    """What `check` says about data keys."""
    run = SimpleNamespace(method=SimpleNamespace(ranking=run_ranking))
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
        ({"file_name": "x.json", "split": "train[:10%]"}, "train[:10%]"),
        ({"script_url": "x"}, "'script_url' is not supported yet"),
        ({"cloud_file_name": "s3://x"}, "'cloud_file_name' is not supported yet"),
        ({"hf_hub_url": "a/b", "subset": "de"}, "'subset' is not supported yet"),
    ],
)
def test_entries_that_cannot_be_used(entry: Any, words: str) -> None:
    assert words in complaint(entry)


def test_columns_and_tags_are_merged_with_the_defaults() -> None:
    entry = find_entry("x", {"x": {"file_name": "x.json", "columns": {"prompt": "q"}, "tags": {"user_tag": "user"}}})
    assert (entry.columns.prompt, entry.columns.query, entry.columns.response, entry.columns.history) == ("q", "input", "output", None)
    assert (entry.tags.user_tag, entry.tags.assistant_tag, entry.tags.role_tag, entry.tags.system_tag) == ("user", "gpt", "from", "system")


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
    assert "identity" in read_registry("data")[0]
    assert default_folder("other") == Path("other")
    (tmp_path / "data").mkdir()
    assert default_folder("data") == Path("data")


def test_a_dict_is_a_registry(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[]")
    registry = {"x": {"file_name": str(path)}}
    assert read_registry(registry) == (registry, None)
    assert findings(dataset="x", dataset_dir=registry) == []


def test_trouble_with_the_file_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "dataset_info.json"
    with pytest.raises(UserError, match=r"there is no .*dataset_info\.json"):
        read_registry(str(tmp_path))
    path.write_text('{\n "a": {},\n "b" 1\n}')
    with pytest.raises(UserError, match=r"dataset_info\.json:3: this is not JSON"):
        read_registry(str(tmp_path))
    path.write_text("[1]")
    with pytest.raises(UserError, match="should hold an object of entries, found a list"):
        read_registry(str(tmp_path))
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": {}}).encode())
    assert read_registry(str(tmp_path))[0] == {"a": {}}


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


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    (told,) = findings(dataset="x", dataset_dir={"x": {"file_name": str(tmp_path / "none.json")}})
    assert "none.json" in told
    assert "does not exist" in told
