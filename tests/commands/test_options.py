"""Every key is told: in the terminal, in docs/keys.md and to editors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from finery.cli import main
from finery.commands.options import json_schema, listing, markdown
from finery.data.template import template_names
from finery.keys import LOOP, all_keys
from finery.methods import METHODS
from finery.models.adapters import ADAPTERS
from finery.run import never, not_yet, own_keys
from finery.training.arguments import RENAMED, trainer_fields

ROOT = Path(__file__).parents[2]
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "string": str,
    "null": type(None),
}

GUIDE = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity, alpaca_en_demo
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/${env:NAME}/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""


def faults(value: Any, schema: Any, root: Any) -> list[str]:
    """What a JSON schema has against a value; knows the words that ours uses."""
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return faults(value, target, root)
    if "anyOf" in schema:
        found = [faults(value, variant, root) for variant in schema["anyOf"]]
        return [] if [] in found else found[0]
    kind = schema.get("type")
    if (kind and (type(value) is bool) != (kind == "boolean")) or (kind and not isinstance(value, TYPES[kind])):
        return [f"{value!r} is no {kind}"]
    limits = {"minimum": "__ge__", "exclusiveMinimum": "__gt__", "maximum": "__le__", "exclusiveMaximum": "__lt__"}
    wrong = [f"{value!r}: {word}" for word, method in limits.items() if word in schema and not getattr(float(value), method)(schema[word])]
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        wrong.append(f"{value!r} is none of {schema['enum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        wrong.append(f"{value!r} has not the form {schema['pattern']}")
    if kind == "array":
        wrong += [fault for item in value for fault in faults(item, schema.get("items", {}), root)]
    if kind == "object" and "properties" in schema:
        wrong += [f"{key} is needed" for key in schema["required"] if key not in value]
        wrong += [f"no such key: {key}" for key in value if key not in schema["properties"]]
        wrong += [
            f"{key}: {fault}"
            for key in value
            if key in schema["properties"]
            for fault in faults(value[key], schema["properties"][key], root)
        ]
    return wrong


def faults_of(text: str, **changes: Any) -> list[str]:
    """What the schema has against a file, as an editor reads it."""
    return faults(yaml.safe_load(text) | changes, json_schema(), json_schema())


# ------------------------------------------------------------------ help


@pytest.mark.parametrize("key", all_keys(), ids=lambda key: key.name)
def test_every_key_has_a_help(key: Any) -> None:
    assert len(key.schema["description"]) > 5


def test_every_key_is_listed_once() -> None:
    names = [key.name for key in all_keys()]
    assert len(names) == len(set(names))
    assert own_keys() <= set(names)
    rest = trainer_fields().keys() - own_keys() - RENAMED.keys() - not_yet()["keys"].keys() - never().keys()
    assert {key.name for key in all_keys() if key.owner == LOOP} == rest


# ------------------------------------------------------------------ the terminal


def test_the_whole_list_fits_the_terminal() -> None:
    text = listing("", 72)
    assert max(len(line) for line in text.splitlines()) <= 72
    for name in own_keys() | RENAMED.keys() | not_yet()["keys"].keys() | never().keys():
        assert re.search(rf"\b{name}\b", text), name


def test_a_key_tells_type_range_default_and_help() -> None:
    assert listing("cutoff_len", 120).startswith("rows: how samples become rows of tokens\n  cutoff_len ")
    line = next(line for line in listing("lora_dropout", 120).splitlines() if "lora_dropout" in line)
    assert line.split(maxsplit=1)[1] == "a number at least 0 and below 1; default 0.0"
    assert "one of cpu, auto; default cpu" in listing("export_device", 120)
    assert "a list, or text with commas; default all" in listing("lora_target", 120)
    assert "a list of numbers, or text with commas; default not set" in listing("interleave_probs", 120)
    assert "one of proportional, drop, error, keep_start, keep_end, split; default proportional" in listing("truncation", 120)
    assert "text; needed" in listing("model_name", 120)
    assert "one of no, steps, epoch; default steps" in listing("logging_strategy", 120)


def test_a_word_filters_keys_and_owners() -> None:
    text = listing("lora", 100)
    assert "use_dora" in text, "its owner is the adapter lora"
    assert "cutoff_len" not in text and "learning_rate" not in text
    assert "not built yet" in listing("ppo_epochs", 100)
    assert "has no effect" not in listing("cutoff-len", 100)
    assert listing("no_cuda", 100) == "old names that still work\n  no_cuda = use_cpu\n"


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["options", "val_size"]) == 0
    assert capsys.readouterr().out == listing("val_size", 80)
    assert main(["options", "lora_rnak"]) == 2
    assert capsys.readouterr().err == "error: no key holds 'lora_rnak'; did you mean 'lora_rank'?\n"
    assert main(["options", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown()
    assert main(["options", "--json-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


# ------------------------------------------------------------------ the docs


def test_the_docs_are_fresh() -> None:
    path = ROOT / "docs/keys.md"
    written, drawn = path.read_text(encoding="utf-8"), markdown()
    if f"of version {transformers.__version__})" not in written:  # another transformers has other texts, ours are the same
        written, drawn = (text.partition(f"## {LOOP}")[0] for text in (written, drawn))
    assert written == drawn, "docs/keys.md is not what the options say: run `make docs`"


def test_tables_hold_their_columns() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(all_keys()) + len(RENAMED)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 5}


# ------------------------------------------------------------------ editors


def test_the_schema_knows_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema") and schema["additionalProperties"] is False
    listed = own_keys() | trainer_fields().keys() | RENAMED.keys() | not_yet()["keys"].keys() | never().keys()
    assert schema["properties"].keys() == listed
    assert schema["required"] == ["model_name_or_path"]
    assert all(property_.get("description") for property_ in schema["properties"].values())


@pytest.mark.parametrize(
    ("key", "names"), [("stage", METHODS.names()), ("finetuning_type", ADAPTERS.names()), ("template", template_names())]
)
def test_the_schema_names_the_parts(key: str, names: list[str]) -> None:
    assert json_schema()["properties"][key]["anyOf"][0]["enum"] == names


def test_every_default_fits_its_own_schema() -> None:
    schema = json_schema()
    for name, property_ in schema["properties"].items():
        if "default" in property_:
            assert faults(property_["default"], property_, schema) in ([], ["'' is none of ['underflow_overflow', 'tpu_metrics_debug']"]), (
                name
            )
            assert faults(None, property_, schema) == [], name


def test_a_good_file_has_no_faults() -> None:
    more = {
        "dataset": ["a", "b"],
        "max_samples": "${other_key}",
        "report_to": ["wandb"],
        "no_cuda": True,
        "packing": None,
        "neat_packing": True,
        "interleave_probs": [0.7, 1],
        "dataset_dir": {"a": {"file_name": "a.json"}, "b": {"file_name": "b.json"}},
        "remove_unused_columns": False,
    }
    assert faults_of(GUIDE) == []
    assert faults_of(GUIDE, **more) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_rnak", 8),
        ("lora_rank", 0),
        ("lora_rank", "eight"),
        ("lora_rank", True),
        ("lora_dropout", 1),
        ("stage", "stf"),
        ("stage", "dpo"),
        ("template", "lama3"),
        ("adam_beta1", 1.5),
        ("optim", "adam"),
        ("report_to", ["wandbb"]),
        ("bf16", "yes"),
        ("packing", "perhaps"),
        ("truncation", "middle"),
        ("interleave_probs", ["most", 1]),
        ("use_audio_in_video", True),
        ("use_kt", True),
        ("no_cuda", 3),
    ],
)
def test_a_fault_is_found(key: str, value: Any) -> None:
    assert len(faults_of(GUIDE, **{key: value})) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_have_no_faults(path: Path) -> None:
    assert faults_of(path.read_text(encoding="utf-8")) == []
