"""Broken configurations: each is answered with all of its faults at once, by file and line, and never by a traceback."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from finery.cli import main
from finery.data.formats import FORMATS
from finery.data.template import template_names
from finery.engines import ENGINES
from finery.methods import METHODS
from finery.models.adapters import ADAPTERS
from finery.training.arguments import enum_values, trainer_fields

FOLDER = Path(__file__).parent / "broken"
CASES: dict[str, list[dict[str, Any]]] = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))
}
"""By kind. A case has a `name`; the `text` of a file (or its bytes as `hex`) called `file`; the `words` of the command line, by
default that file; and the lines that it should `expect`. What BASE has and a YAML text has not is added to the text, but for the keys
in `without`; a `complete` text stays as it is. `{dir}` stands for the case's folder, `{known:stage}` for the names there are or, where
they are many, their number, `{all:stage}` for the names however many: a new part needs no change here."""
ALL = [pytest.param(case, id=f"{kind}: {case['name']}") for kind, cases in CASES.items() for case in cases]

BASE = {"model_name_or_path": "./model", "dataset": "sums", "dataset_dir": "./data", "output_dir": "./out", "do_train": "true"}
REGISTRY = {
    "sums": {"file_name": "sums.json"},
    "names": {"file_name": "sums.json"},
    "gone": {"file_name": "gone.json"},
    "typo": {"file_name": "sums.json", "columns": {"promt": "question"}},
    "shape": {"file_name": "sums.json", "formatting": "alpacca"},
    "plain": "sums.json",
    "slice": {"file_name": "sums.json", "split": "train[10]"},
    "program": {"script_url": "loader"},
}
NAMES: dict[str, Callable[[], Sequence[str]]] = {
    "stage": METHODS.names,
    "finetuning_type": ADAPTERS.names,
    "infer_backend": ENGINES.names,
    "template": template_names,
    "formatting": FORMATS.names,
    "lr_scheduler_type": lambda: enum_values("SchedulerType"),
    "optim": lambda: trainer_fields()["optim"].choices,
}


def lay_out(folder: Path) -> None:
    """What the cases refer to: a model, an adapter, and data with a sound and a torn registry."""
    files = {
        "model/config.json": "{}",
        "adapter/adapter_config.json": "{}",
        "data/sums.json": "[]",
        "data/dataset_info.json": json.dumps(REGISTRY),
        "torn/dataset_info.json": '{\n "sums": {\n',
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def write(case: dict[str, Any], folder: Path) -> list[str]:
    """Write the file of a case; returns the words of the command line."""
    name = case.get("file", "run.yaml")
    if "hex" in case:
        (folder / name).write_bytes(bytes.fromhex(case["hex"]))
    elif "text" in case:
        text = case["text"]
        if name.endswith(".yaml") and not case.get("complete"):
            left_out = {line.partition(":")[0] for line in text.splitlines()} | set(case.get("without", ()))
            text += "".join(f"{key}: {value}\n" for key, value in BASE.items() if key not in left_out)
        (folder / name).write_text(text, encoding="utf-8")
    return [word.replace("{dir}", str(folder)) for word in case.get("words", [f"{{dir}}/{name}"])]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a case, gone into."""
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("FINERY_NO_SUCH", "FINERY_NEITHER", "ALLOW_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def expected(case: dict[str, Any], folder: Path) -> list[str]:
    lines = [f"error: {line.replace('{dir}', str(folder))}" for line in case["expect"]]
    for key, names in NAMES.items():
        every = ", ".join(names())
        known = every if len(names()) <= 15 else f"{len(names())} names"
        lines = [line.replace(f"{{known:{key}}}", known).replace(f"{{all:{key}}}", every) for line in lines]
    return lines


@pytest.mark.parametrize("case", ALL)
def test_tells_every_fault(case: dict[str, Any], broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", *write(case, broken)])
    said = capsys.readouterr()
    assert said.err.splitlines() == expected(case, broken)
    assert (code, said.out) == (2, "")
    assert not (broken / "out").exists()


PROBE = """
import sys
from finery.cli import main
code = main(["train", *sys.argv[1:]])
print({"torch", "transformers"} & set(sys.modules))
sys.exit(code)
"""


@pytest.mark.parametrize("kind, name", [("our_keys", "two keys misspelt"), ("syntax", "tab"), ("contradictions", "two ways to hold out")])
def test_in_a_process_of_its_own_without_torch(kind: str, name: str, broken: Path) -> None:
    (case,) = (case for case in CASES[kind] if case["name"] == name)
    done = subprocess.run([sys.executable, "-c", PROBE, *write(case, broken)], capture_output=True, text=True, timeout=300)
    assert done.stderr.splitlines() == expected(case, broken)
    assert (done.returncode, done.stdout) == (2, "set()\n")


def test_corpus_is_large_and_mixed() -> None:
    cases = [case for kind in CASES.values() for case in kind]
    assert len(cases) >= 64
    assert len(CASES) >= 8
    assert max(map(len, CASES.values())) <= 10
    assert 2 * sum(len(case["expect"]) >= 2 for case in cases) >= len(cases)
    names = [(kind, case["name"]) for kind, found in CASES.items() for case in found]
    assert len(names) == len(set(names))
