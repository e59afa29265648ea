"""From controls to keys and back: what a page shows is what the command line takes."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from finery.errors import UserError
from finery.keys import all_keys
from finery.web.arguments import as_command, as_yaml, more_keys, to_keys, to_values, typed
from finery.web.form import controls


def held(**changes: Any) -> dict[str, Any]:
    """What all controls hold at first, but for some; `__` stands for the dot of an id."""
    return {id: control.begins for id, control in controls().items()} | {name.replace("__", "."): value for name, value in changes.items()}


def test_every_key_of_a_control_is_one_and_no_key_of_a_tab_is_set_twice() -> None:
    known = {key.name for key in all_keys()}
    for tab in {control.tab for control in controls().values()}:
        keys = [key for control in controls().values() if control.tab == tab for key in control.keys]
        assert set(keys) <= known
        assert len(keys) == len(set(keys)), tab


def test_what_a_reader_looks_for_is_written_and_other_defaults_are_not() -> None:
    keys = to_keys(held(top__model_path="some/model", train__dataset=["one", "two"]), "train")
    assert keys["model_name_or_path"] == "some/model"
    assert keys["dataset"] == ["one", "two"]
    assert (keys["learning_rate"], keys["lora_rank"], keys["cutoff_len"], keys["finetuning_type"]) == (5e-5, 8, 2048, "lora")
    assert not {"seed", "use_rslora", "val_size", "quantization_bit", "rope_scaling", "use_galore", "galore_rank"} & keys.keys()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"top__quantization_bit": "4"}, {"quantization_bit": 4}),
        ({"top__booster": "flashattn2"}, {"flash_attn": "fa2"}),
        ({"train__compute_type": "fp32"}, {"bf16": False}),
        ({"train__compute_type": "pure_bf16"}, {"pure_bf16": True}),
        ({"train__use_pissa": True}, {"pissa_init": True, "pissa_convert": True}),
        ({"train__loraplus_lr_ratio": 16}, {"loraplus_lr_ratio": 16}),
        ({"train__packing": "false"}, {"packing": False}),
        ({"train__enable_thinking": False}, {"enable_thinking": False}),
        ({"train__report_to": ["tensorboard", "wandb"]}, {"report_to": ["tensorboard", "wandb"]}),
        ({"train__use_galore": True, "train__galore_rank": 32}, {"use_galore": True, "galore_rank": 32}),
        ({"top__finetuning_type": "freeze", "train__freeze_trainable_layers": 3}, {"freeze_trainable_layers": 3}),
        ({"train__train_seed": "7"}, {"seed": 7}),
        ({"train__learning_rate": "high"}, {"learning_rate": "high"}),  # the run says what is wrong with it
    ],
)
def test_there_and_back_again(changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    before = held(top__model_path="m", **changes)
    keys = to_keys(before, "train")
    assert {key: keys.get(key) for key in wanted} == wanted
    after, rest = to_values(keys, "train")
    assert rest == {}
    assert to_keys(after, "train") == keys


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"top__finetuning_type": "full", "train__use_rslora": True}, {"use_rslora", "lora_rank"}),
        ({"train__galore_rank": 32}, {"galore_rank"}),
        ({"top__finetuning_type": "lora", "train__freeze_extra_modules": "x"}, {"freeze_extra_modules"}),
        ({"train__use_badam": True, "train__badam_update_ratio": 0.5}, {"badam_update_ratio"}),
    ],
)
def test_what_does_not_count_is_not_written(changes: dict[str, Any], absent: set[str]) -> None:
    assert not absent & to_keys(held(**changes), "train").keys()


def test_keys_without_a_control_are_kept() -> None:
    values, rest = to_values({"model_name_or_path": "m", "warmup_ratio": 0.1, "placeholders": {"name": "Finn"}}, "train")
    assert values["top.model_path"] == "m"
    assert rest == {"warmup_ratio": 0.1, "placeholders": {"name": "Finn"}}


def test_a_shell_and_a_file_get_the_same() -> None:
    """Whatever stands in a value: quotes, spaces, dollars, line ends."""
    keys = {
        "model_name_or_path": "a b",
        "dataset": ["x", "y"],
        "placeholders": {"name": "it's $HOME `id`"},
        "plot_loss": True,
        "system": 'a"\nb',
    }
    assert yaml.safe_load(as_yaml(keys)) == keys
    command = as_command(keys)
    assert command.startswith("llamafactory-cli train \\\n    --model_name_or_path 'a b' \\\n")
    words = shlex.split(command.replace("\\\n", " "))
    assert dict(zip(words[2::2], words[3::2], strict=True)) == {
        "--model_name_or_path": "a b",
        "--dataset": "x,y",
        "--placeholders": '{"name": "it\'s $HOME `id`"}',
        "--plot_loss": "true",
        "--system": 'a"\nb',
    }


def test_typed_values() -> None:
    assert [typed(text) for text in ("5e-5", " 3 ", "true", "", "cosine", 2.0)] == [5e-5, 3, True, None, "cosine", 2]
    assert typed("a, b", []) == ["a", "b"]


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just words"])
def test_further_keys_that_are_no_mapping_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="further keys"):
        more_keys(text)


def test_the_users_command_runs_as_it_is(tmp_path: Path) -> None:
    """The words of a previewed command make the run that the page describes."""
    from finery.run import Run

    keys = to_keys(held(top__model_path=str(tmp_path), train__dataset=["a"], train__lora_target="q_proj,v_proj"), "train")
    words = shlex.split(as_command(keys | {"output_dir": "out"}).replace("\\\n", " "))[2:]
    (tmp_path / "config.json").write_text("{}")
    run = Run.read(words)
    assert (run.adapter.options.lora_target, run.loop.learning_rate, run.data.dataset) == (("q_proj", "v_proj"), 5e-5, ("a",))
