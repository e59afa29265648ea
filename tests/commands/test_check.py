"""`finery check`: a run or data files, exit codes, JSON, and the same refusals as training."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finery.cli import main
from finery.data.registry import PACKAGED

GOOD = '{"instruction": "Name a colour.", "output": "Red."}\n{"instruction": "And another.", "output": "Blue."}\n'
BAD = GOOD + '{"instruction": "And a third."}\n'


@pytest.fixture(autouse=True)
def inside(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a run, a sound data set and one with a row that cannot be learnt."""
    monkeypatch.chdir(tmp_path)
    entries = {name: {"file_name": f"{name}.jsonl"} for name in ("good", "bad")}
    texts = {"good.jsonl": GOOD, "bad.jsonl": BAD, "dataset_info.json": json.dumps(entries)}
    for name, text in texts.items():
        Path(name).write_text(text)
    Path("model").symlink_to(tiny_model)
    write_run()


def write_run(name: str = "run.yaml", **keys: Any) -> str:
    """The file of a run."""
    base = {"model_name_or_path": "model", "output_dir": "out", "do_train": True, "dataset": "good", "dataset_dir": "."}
    Path(name).write_text(json.dumps(base | keys) if name.endswith(".json") else yaml.safe_dump(base | keys))
    return name


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    code = main(["check", *words])
    return code, re.sub(r" in \d+\.\d s", " in N s", capsys.readouterr().out).splitlines()


def test_a_clean_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = check(capsys, "run.yaml")
    assert code == 0
    assert told == [
        "data set 'good': 2 rows in N s",
        "the model's own template on data set 'good': 2 rows in N s: 2 as one row, 0 as one row per answer",
        "the model's own template on hard conversations: 21 rows in N s, 4 of them left out: 17 as one row, 0 as one row per answer",
        "clean: nothing to mend in 2 rows of 1 data set",
    ]
    assert not Path("out").exists(), "a check writes nothing"


def test_a_run_with_findings(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = check(capsys, "run.yaml", "dataset=good, bad")
    assert code == 1
    assert told[0].startswith("bad.jsonl:2:output: is not in the record; write an answer or take the row out")
    assert told[0].endswith(" (line 3; left out)")
    assert told[1].startswith("bad.jsonl:0: is the same sample as good.jsonl:0; ")
    assert [line for line in told[2:] if "template" not in line] == [
        "data set 'good': 2 rows in N s",
        "data set 'bad': 3 rows in N s, 1 of them left out",
        "2 findings in 5 rows of 2 data sets",
    ]
    assert any(line.endswith("'bad': 2 rows in N s: 2 as one row, 0 as one row per answer") for line in told)


@pytest.mark.parametrize("words", [["lora_rnak=4"], ["dataset=god"], ["--learning_rate", "fast"], ["stage=dpo"]])
def test_what_training_refuses_is_refused_alike(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = {}
    for command in ("check", "train"):
        assert main([command, "run.yaml", *words]) == 2
        told[command] = capsys.readouterr()
    assert told["check"].err == told["train"].err != ""
    assert told["check"].out == ""


def test_a_run_that_has_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(dataset="")
    assert main(["check", "run.yaml"]) == main(["train", "run.yaml"]) == 2


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = check(capsys, "run.yaml", "--json", "dataset=bad")
    found = json.loads("\n".join(told))
    assert (code, found["exit_code"]) == (1, 1)
    (finding,) = found["findings"]
    assert (finding["place"], finding["what"], finding["effect"]) == ("bad.jsonl:2:output", "is not in the record", "left out")
    assert (finding["rows"], finding["num_rows"], finding["line"]) == (["bad.jsonl:2"], 1, 3)
    assert finding["mend"].startswith("write an answer")
    checked, proved, hard = found["checked"]
    assert (proved["num_used"], hard["num_used"], proved["again"]) == (2, 17, True)
    assert (checked["name"], checked["num_rows"], checked["num_used"]) == ("data set 'bad'", 3, 2)
    assert checked["seconds"] >= 0


@pytest.mark.parametrize(
    ("words", "code", "rows"),
    [
        (["good.jsonl"], 0, "2 rows of 1 data set"),
        (["good.jsonl", "bad.jsonl"], 1, "5 rows of 2 data sets"),
        (["*d.jsonl"], 1, "5 rows of 1 data set"),
        (["folder"], 0, "2 rows of 1 data set"),
        (["gone.jsonl"], 2, "0 rows of 0 data sets"),
        (["good.xlsx"], 2, "0 rows of 0 data sets"),
    ],
)
def test_data_files_by_themselves(words: list[str], code: int, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    Path("folder/x.jsonl").write_text(GOOD)
    Path("good.xlsx").write_bytes(b"PK\x03\x04")
    found, told = check(capsys, *words)
    assert found == code
    assert rows in told[-1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "data set 'x.json': holds no records: x.json is empty"),
        (GOOD, "data set 'x.json': 2 rows in N s"),
        ('{\n "rows": [{"instruction": "a", "output": "b"}]\n}', "data set 'x.json': x.json holds one JSON object; "),
    ],
)
def test_a_json_file_of_data_is_no_run(text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.json").write_text(text)
    assert check(capsys, "x.json")[1][0].startswith(told)


def test_a_json_file_of_a_run_is_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, write_run("run.json"), "dataset=bad")[0] == 1
    Path("run.json").write_text('{"model_name_or_path": "model", "dataset": ')
    assert main(["check", "run.json"]) == 2
    assert "run.json:1: this is not JSON" in capsys.readouterr().err


def test_data_files_take_no_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "good.jsonl", "stage=sft"]) == 2
    assert capsys.readouterr().err == "error: a check of data files takes no keys, found 'stage=sft'; give the file of a run instead\n"


def test_findings_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """What training warns of while it opens a data set, the check says among its findings."""
    entry = {"file_name": "good.jsonl", "columns": {"prompt": "instruction", "response": "output", "system": "sytem"}}
    Path("dataset_info.json").write_text(json.dumps({"good": entry}))
    assert main(["check", "run.yaml"]) == 1
    said = capsys.readouterr()
    assert "sytem" not in said.err
    assert said.out.startswith("dataset_info.json: good.columns.system: column 'sytem' is in none of its 2 records; ")


def test_the_packaged_demo_data_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    names = ",".join(json.loads((PACKAGED / "dataset_info.json").read_text()))
    words = [f"dataset={names}", f"dataset_dir={PACKAGED}", "placeholders={name: Ada, author: us}"]
    code, told = check(capsys, "run.yaml", *words)
    assert (code, told[-1]) == (0, "clean: nothing to mend in 180 rows of 5 data sets"), told
    assert [line.partition(" ")[0] for line in told[:-1]] == ["data"] * 5 + ["the"] * 6


def test_in_a_process_of_its_own_without_torch() -> None:
    probe = "import sys; from finery.cli import main; code = main(['check', 'bad.jsonl']); print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "False"), done.stderr


def test_json_of_a_config_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = check(capsys, "run.yaml", "--json", "lora_rnak=4", "stage=nope")
    found = json.loads("\n".join(told))
    assert (code, found["exit_code"], found["checked"]) == (2, 2, [])
    assert [finding["effect"] for finding in found["findings"]] == ["stops the run"] * len(found["findings"])
    assert any("lora_rnak" in finding["what"] for finding in found["findings"])
