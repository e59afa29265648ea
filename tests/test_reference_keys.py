"""Every key of the reference has one of four answers, and the list of what is not built yet only gets shorter."""

import os
import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from finery import run
from finery.errors import Complaint, UserError
from finery.options import Entry, Keys
from finery.run import PARTS, Run, never, not_yet, own_keys
from finery.training.arguments import RENAMED, trainer_fields

ROOT = Path(__file__).parents[1]
BASE = {"model_name_or_path": "somewhere"}
FACTORY = "<factory>"


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Any]:
    """Each key of the reference's table with its default."""
    text = (shared / "reference/config-keys.md").read_text(encoding="utf-8")
    keys = text[text.index("\n## 2.") : text.index("\n## 9.")]
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| `([^`]*)` \|", keys, re.MULTILINE)
    passed = re.findall(r"`(\w+)`=([^,\s]*)", keys[keys.index("\n## 8.") :])
    return {name: _value(default) for name, default in [*passed, *rows]} | {"kt_config": None}


def _value(text: str) -> Any:
    if text == "<required>":
        return None
    number = re.fullmatch(r"[\d.]+e-?\d+", text)
    return float(text) if number else yaml.safe_load(text.strip())


def test_the_tables_were_read(reference: dict[str, Any]) -> None:
    assert len(reference) > 350
    assert reference["lora_rank"] == 8 and reference["loraplus_lr_embedding"] == 1e-6
    assert reference["sortish_sampler"] is False and reference["extra_config"] is None


def _answers(name: str) -> list[str]:
    listed = {"not yet": name in not_yet()["keys"], "never": name in never()}
    trainers = (name in trainer_fields() and not any(listed.values())) or name in RENAMED
    classes = {"claimed": name in own_keys(), **listed, "the trainer's": trainers and name not in own_keys()}
    return [answer for answer, true in classes.items() if true]


def test_every_key_has_exactly_one_answer(reference: dict[str, Any]) -> None:
    every = reference.keys() | trainer_fields().keys()
    assert {name: answers for name in sorted(every) if len(answers := _answers(name)) != 1} == {}


def test_what_is_built_is_not_listed_as_missing() -> None:
    claimed = own_keys() | RENAMED.keys() | set(RENAMED.values())
    assert claimed & not_yet()["keys"].keys() == set()
    assert claimed & never().keys() == set()
    for registry, key in PARTS.values():
        assert set(not_yet()["choices"].get(key, [])) & set(registry.names()) == set()
    commands = {path.stem for path in (ROOT / "src/finery/commands").glob("*.py")}
    assert commands & not_yet()["commands"].keys() == set()


def test_no_key_is_invented(reference: dict[str, Any]) -> None:
    assert not_yet()["keys"].keys() - reference.keys() - trainer_fields().keys() == set()
    assert set(not_yet()["choices"]) <= {key for _, key in PARTS.values()}


def test_the_harmless_defaults_are_the_reference_s(reference: dict[str, Any]) -> None:
    listed = not_yet()["keys"] | {name: line["default"] for name, line in never().items()}
    defaults = {name: field.default for name, field in trainer_fields().items()} | reference
    known = {name: defaults[name] for name in listed if defaults.get(name, FACTORY) != FACTORY}
    assert {name: listed[name] for name in known} == known
    assert {type(listed[name]) for name in known if isinstance(known[name], bool)} == {bool}


def _other(default: Any) -> Any:
    """A value that asks for something."""
    return not default if isinstance(default, bool) else 7 if default != 7 else 8


def _answer(name: str, value: Any) -> list[Complaint]:
    """What is said of a key; it must be taken out, so that neither the trainer nor anybody else gets it."""
    keys: Keys = {name: Entry(value, "x.yaml:3"), "lora_rank": Entry(4, "x.yaml:4")}
    complaints: list[Complaint] = []
    run._answer_listed(keys, complaints)
    assert list(keys) == ["lora_rank"]
    return complaints


@pytest.mark.parametrize("name", not_yet()["keys"])
def test_a_key_that_is_not_built_yet(name: str) -> None:
    default = not_yet()["keys"][name]
    assert _answer(name, default) == _answer(name, None) == []
    assert _answer(name, _other(default)) == [f"x.yaml:3: {name!r} is not built yet; leave it out"]


@pytest.mark.parametrize("name", never())
def test_a_key_that_will_not_come(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(run.log, "warning", lambda text, *parts: warnings.append(text % parts))
    line = never()[name]
    assert _answer(name, line["default"]) == _answer(name, None) == []
    assert warnings == []
    complaints = _answer(name, _other(line["default"]))
    if line.get("harmless"):
        assert (complaints, warnings) == ([], [f"x.yaml:3: {name!r} has no effect: {line['instead']}"])
    else:
        assert (complaints, warnings) == ([f"x.yaml:3: {name!r} will not come: {line['instead']}"], [])


def test_every_line_of_never_says_what_to_do() -> None:
    for name, line in never().items():
        assert set(line) <= {"default", "instead", "harmless"}, name
        assert len(line["instead"].split()) > 2 and line["instead"][-1] != ".", name


def test_false_is_nothing_where_nothing_is_the_default() -> None:
    accepted = Run.from_dict({**BASE, "packing": False, "deepspeed": False, "remove_unused_columns": True, "adam_beta1": "0.8"})
    assert dict(accepted.trainer) == {"adam_beta1": 0.8}
    with pytest.raises(UserError, match="'dataloader_in_order' is not built yet"):
        Run.from_dict({**BASE, "dataloader_in_order": False})


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in not_yet()["choices"].items() for value in values])
def test_a_choice_that_is_not_built_yet(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' '{value}' is not built yet; there are: "):
        Run.from_dict({**BASE, key: value})


def test_a_key_that_is_not_built_yet_is_told_beside_other_faults() -> None:
    with pytest.raises(UserError) as caught:
        Run.from_dict({**BASE, "enable_torch_profiler": True, "lora_rnak": 4, "adam_beta1": 2})
    assert caught.value.complaints == [
        "Python: 'enable_torch_profiler' is not built yet; leave it out",
        "Python: 'adam_beta1' should be below 1, found 2",
        "Python: no such key: 'lora_rnak'; did you mean 'lora_rank'?",
    ]


# ------------------------------------------------------------------ what is the trainer's


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("adam_beta1", "0.8", 0.8),
        ("run_name", 2026, "2026"),
        ("use_cpu", "true", True),
        ("logging_strategy", False, "no"),
        ("include_num_input_tokens_seen", True, True),
        ("include_num_input_tokens_seen", "non_padding", "non_padding"),
        ("report_to", "wandb, tensorboard", ["wandb", "tensorboard"]),
        ("report_to", ["wandb"], "wandb"),
        ("debug", "underflow_overflow", "underflow_overflow"),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, {"num_cycles": 2}),
        ("optim_target_modules", "q_proj", "q_proj"),
        ("optim_target_modules", ["q_proj"], ["q_proj"]),
    ],
)
def test_a_trainer_s_key_is_read_as_its_type(key: str, value: Any, read: Any) -> None:
    assert dict(Run.from_dict({**BASE, key: value}).trainer) == {key: read}


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("adam_beta1", "fast", "should be a number"),
        ("adam_beta1", True, "should be a number"),
        ("adam_beta1", -0.1, "should be at least 0"),
        ("dataloader_num_workers", 1.5, "should be a whole number"),
        ("dataloader_prefetch_factor", 0, "should be above 0"),
        ("use_cpu", "perhaps", "should be true or false"),
        ("lr_scheduler_kwargs", "num_cycles=2", "should be a mapping"),
        ("debug", "overflow", "should be one of underflow_overflow, tpu_metrics_debug"),
        ("include_num_input_tokens_seen", "some", "should be one of all, non_padding, no"),
        ("log_level", "loud", "should be one of detail, debug, info, warning, error, critical, passive"),
        ("optim_target_modules", {}, "should be a list or text"),
    ],
)
def test_a_trainer_s_key_of_another_type(key: str, value: Any, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        Run.from_dict({**BASE, key: value})
    (told,) = caught.value.complaints
    assert told.startswith(f"Python: {key!r} {complaint}, found ")


def test_an_empty_key_of_the_trainer_means_the_default() -> None:
    assert dict(Run.from_dict({**BASE, "adam_beta1": None, "report_to": None}).trainer) == {}


def test_unknown_trackers_are_told() -> None:
    with pytest.raises(UserError, match=r"'report_to' should be one of .*wandb"):
        Run.from_dict({**BASE, "report_to": ["wandbb"]})


def test_the_trainer_s_defaults_are_those_of_its_class() -> None:
    from transformers import TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    known = {name: field.default for name, field in trainer_fields().items() if name != "include_for_metrics"}
    assert known == {name: fields[name].default for name in known}


# ------------------------------------------------------------------ the list only gets shorter


def _git(*words: str) -> str:
    alone = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.run(["git", *words], cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout


def _versions() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each version of the list with its name, the oldest first, the working tree's last."""
    for commit in reversed(_git("log", "--first-parent", "--format=%h", "--", "src/finery/not_yet.yaml").split()):
        yield commit, yaml.safe_load(_git("show", f"{commit}:src/finery/not_yet.yaml"))
    yield "the working tree", not_yet()


def grown(versions: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What a version holds and the one before it did not."""
    found = []
    for (_, before), (name, after) in pairwise(versions):
        for part in ("commands", "keys"):
            found += [f"{name}: {part} {key}" for key in after.get(part) or {} if key not in (before.get(part) or {})]
        for key, values in (after.get("choices") or {}).items():
            found += [f"{name}: {key} {value}" for value in values if value not in (before.get("choices") or {}).get(key, [])]
    return found


def test_growth_is_seen() -> None:
    before = {"commands": {"api": "serve"}, "choices": {"stage": ["pt", "rm"]}, "keys": {"packing": None}}
    shorter = {"commands": {}, "choices": {"stage": ["rm"]}, "keys": {}}
    assert grown([("a", before), ("b", shorter)]) == []
    assert grown([("b", shorter), ("a", before)]) == ["a: commands api", "a: keys packing", "a: stage pt"]


def test_the_list_only_gets_shorter() -> None:
    try:
        shallow = _git("rev-parse", "--is-shallow-repository").strip() == "true"
        versions = list(_versions())
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the project's git history")
    if len(versions) < 2:
        pytest.skip("needs the project's git history: the list is not in it yet" if not shallow else "needs the whole git history")
    assert grown(versions) == [], "what is not built yet may only get less: build it, or answer it in never.yaml"
