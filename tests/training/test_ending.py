"""How runs begin and end in folders that are not empty, and what is told instead of a traceback."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finery
from finery.cli import main
from finery.errors import UserError

Keys = Callable[..., dict[str, Any]]


def words_of(given: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def test_overwriting_removes_what_the_old_run_wrote_and_nothing_else(keys: Keys) -> None:
    folder = finery.train(keys(val_size=4, save_strategy="steps", save_steps=1, plot_loss=True))
    (folder / "notes.txt").write_text("mine")
    finery.train(keys(finetuning_type="full", overwrite_output_dir=True, max_steps=1))
    names = {path.name for path in folder.iterdir()}
    assert "notes.txt" in names
    assert "model.safetensors" in names
    old = {"adapter_model.safetensors", "adapter_config.json", "checkpoint-1", "eval_results.json", "training_loss.png"}
    assert not names & old
    assert "eval_loss" not in json.loads((folder / "all_results.json").read_text())


def test_a_run_that_cannot_begin_costs_nothing(keys: Keys) -> None:
    folder = finery.train(keys(save_strategy="steps", save_steps=1))
    before, others = sorted(str(path) for path in folder.rglob("*")), multiprocessing.active_children()
    with pytest.raises(UserError, match="lora_target"):
        finery.train(keys(overwrite_output_dir=True, lora_target="nope"))
    assert sorted(str(path) for path in folder.rglob("*")) == before
    assert set(multiprocessing.active_children()) <= set(others), "nothing goes on encoding"


def test_a_finished_run_has_nothing_to_go_on_with(keys: Keys) -> None:
    given = keys(save_strategy="steps", save_steps=1)
    folder = finery.train(given)
    with pytest.raises(UserError, match=r"is the end of a run of 2 steps"):
        finery.train(given)
    assert not (folder / "checkpoint-3").exists()
    before = (folder / "run.yaml").read_text()
    with pytest.raises(UserError, match=r"is of another run: 'learning_rate' was 0\.001, is 9\.0"):
        finery.train(given | {"learning_rate": 9.0})
    with pytest.raises(UserError, match=r"'max_steps' was 2, is 3.*'resume_from_checkpoint: true' goes on in spite of that"):
        finery.train(given | {"max_steps": 3})
    assert (folder / "run.yaml").read_text() == before, "a run that was refused left its settings"
    finery.train(given | {"max_steps": 3, "resume_from_checkpoint": True})
    assert (folder / "checkpoint-3").exists()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "'lr_scheduler_type' and 'lr_scheduler_kwargs' do not fit"),
        ({"max_steps": 0}, "'max_steps' should be 1 or more"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 100}, "leaves no step"),
        ({"metric_for_best_model": "accuracy"}, "'metric_for_best_model' should be loss or eval_loss, which is what evaluation measures"),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Any], wanted: str, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    given = keys(save_strategy="steps", save_steps=1)
    folder = finery.train(given)
    before = sorted(str(path) for path in folder.rglob("*"))
    capsys.readouterr()
    assert main(["train", *words_of(given | {"max_steps": 5, "overwrite_output_dir": True} | changes)]) == 2
    told = capsys.readouterr().err
    assert wanted in told
    assert "Traceback" not in told
    assert sorted(str(path) for path in folder.rglob("*")) == before, "what cannot begin costs nothing"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"lora_rank": 3}, "'lora_rank' was 8, is 3"),
        ({"finetuning_type": "full"}, '\'finetuning_type\' was "lora", is "full"'),
        ({"optim": "adamw_bnb_8bit"}, "'optim' was"),
        ({"seed": 7, "cutoff_len": 64}, "'cutoff_len' was 128, is 64; 'seed' was 42, is 7"),
        ({"gradient_accumulation_steps": 2}, "'per_device_train_batch_size x gradient_accumulation_steps' was 4, is 8"),
        ({"dataset": "names"}, "data set 'names' (is new); data set 'sums' (is gone)"),
        ({"default_system": "Be brief."}, "'default_system' was null"),
    ],
)
def test_another_run_is_not_gone_on_with(changes: dict[str, Any], wanted: str, keys: Keys) -> None:
    given = keys(save_strategy="steps", save_steps=1)
    folder = finery.train(given)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    for asked in ({}, {"resume_from_checkpoint": True}):
        with pytest.raises(UserError) as told:
            finery.train(given | changes | asked)
        assert wanted in str(told.value)
        assert "'overwrite_output_dir: true' starts anew" in str(told.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"} == before


@pytest.mark.parametrize("broken", ["trainer_state.json", "optimizer.json"])
def test_an_incomplete_checkpoint_is_passed_over(broken: str, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    given = keys(save_strategy="steps", save_steps=1)
    folder = finery.train(given)
    (folder / "manifest.json").unlink()  # as if it had not ended
    state = folder / "checkpoint-2" / broken
    state.write_text(state.read_text()[:20]) if broken == "trainer_state.json" else state.unlink()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        finery.train(given | {"resume_from_checkpoint": str(folder / "checkpoint-2")})
    capsys.readouterr()
    finery.train(given)
    assert "going on with" in (told := capsys.readouterr().err)
    assert "checkpoint-1" in told


def test_an_adapters_folder_is_no_model(keys: Keys, tmp_path: Path) -> None:
    folder = finery.train(keys())
    with pytest.raises(UserError, match="which holds an adapter; give it as 'adapter_name_or_path'"):
        finery.train(keys(model_name_or_path=str(folder), output_dir=str(tmp_path / "other")))


def test_an_evaluation_leaves_the_settings_of_the_training(keys: Keys) -> None:
    folder = finery.train(keys(val_size=4))
    before = [(folder / name).read_text() for name in ("run.yaml", "README.md")]
    finery.train(keys(do_train=False, do_eval=True, val_size=4, learning_rate=9))
    assert [(folder / name).read_text() for name in ("run.yaml", "README.md")] == before


@pytest.mark.parametrize("fresh", [False, True])
def test_the_file_that_goes_on_with_adapters_serves_what_it_trained(keys: Keys, tmp_path: Path, fresh: bool) -> None:
    """What the run merged comes first, then its own adapter; with that file, and with its output folder alone."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    starts = [finery.train(keys(output_dir=str(tmp_path / name), learning_rate=0.05, seed=n)) for n, name in enumerate(("a", "b"))]
    given = keys(adapter_name_or_path=",".join(map(str, starts)), create_new_adapter=fresh, learning_rate=0.05)
    folder = finery.train(given)
    wanted: object = AutoModelForCausalLM.from_pretrained(given["model_name_or_path"], dtype=torch.float32)
    for adapter in [*(starts if fresh else starts[:1]), folder]:
        wanted = PeftModel.from_pretrained(wanted, str(adapter)).merge_and_unload()  # type: ignore[arg-type]
    for number, asked in enumerate((given, {key: value for key, value in given.items() if key != "adapter_name_or_path"})):
        found = load_file(finery.export(asked | {"export_dir": str(tmp_path / f"e{number}")}) / "model.safetensors")
        state = wanted.state_dict()  # type: ignore[attr-defined]
        assert all(torch.allclose(found[name], state[name], atol=1e-6) for name in found)


def test_another_adapter_counts_before_what_was_trained(keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = finery.train(keys(output_dir=str(tmp_path / "other")))
    given = keys()
    finery.train(given)
    capsys.readouterr()
    finery.chat(given | {"adapter_name_or_path": str(other), "max_new_tokens": 2}, [{"role": "user", "content": "Hi"}])
    assert "'adapter_name_or_path' counts, not what was trained in" in capsys.readouterr().err


def test_an_export_never_takes_other_files_with_it(keys: Keys, tmp_path: Path) -> None:
    given = keys(output_dir=str(tmp_path / "all" / "run"))
    finery.train(given)
    exported = finery.export(given | {"export_dir": str(tmp_path / "e")})
    finery.export(given | {"export_dir": str(exported)})
    (exported / "mine.gguf").write_text("precious")
    with pytest.raises(UserError, match="holds files that no export has written"):
        finery.export(given | {"export_dir": str(exported)})
    with pytest.raises(UserError, match="name another folder"):
        finery.export(given | {"export_dir": str(tmp_path / "all"), "adapter_name_or_path": given["output_dir"]})
    assert (exported / "mine.gguf").read_text() == "precious"


def test_an_unfinished_run_is_not_exported_as_its_base(keys: Keys, tmp_path: Path) -> None:
    given = keys(save_strategy="steps", save_steps=1)
    folder = finery.train(given)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no finished model; its newest checkpoint is .*checkpoint-2"):
        finery.export(given)


def test_a_runs_own_files_never_replace_the_users(keys: Keys, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    (folder / "checkpoint-old").mkdir(parents=True)
    for name in ("README.md", "run.yaml", "checkpoint-notes"):
        (folder / name).write_text("mine\n")
    finery.train(keys(output_dir=str(folder), overwrite_output_dir=True))
    kept = {"README.given.md", "run.given.yaml", "checkpoint-notes"}
    assert all((folder / name).read_text() == "mine\n" for name in kept)
    assert (folder / "checkpoint-old").is_dir()
    shutil.copytree(tiny_model, tmp_path / "base")
    with pytest.raises(UserError, match="is what the run starts from"):
        finery.train(keys(model_name_or_path=str(tmp_path / "base"), output_dir=str(tmp_path / "base")))


def test_home_is_the_same_everywhere(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert finery.train(keys(output_dir="~/here")) == tmp_path / "here"
    assert {"run.yaml", "adapter_model.safetensors"} <= {path.name for path in (tmp_path / "here").iterdir()}


def test_going_on_with_other_save_steps(keys: Keys) -> None:
    given = keys(save_strategy="steps", save_steps=1)
    folder = finery.train(given)
    finery.train(given | {"max_steps": 6, "save_steps": 3, "resume_from_checkpoint": True})
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-6"}


def test_a_base_of_convolutions_has_linear_layers_too(keys: Keys, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2)).save_pretrained(str(tmp_path / "gpt2"))
    tokenizer.save_pretrained(str(tmp_path / "gpt2"))
    folder = finery.train(keys(model_name_or_path=str(tmp_path / "gpt2")))
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert {"c_attn", "c_proj", "c_fc"} <= set(targets)


def test_samples_are_counted_with_accumulation(keys: Keys) -> None:
    folder = finery.train(keys(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2))
    results = json.loads((folder / "train_results.json").read_text())
    ratio = results["train_tokens_per_second"] / results["train_samples_per_second"]
    assert 50 < ratio < 69  # tokens of a sample of `sums`; 4 times as many if accumulation were forgotten


def test_a_full_run_is_exported_in_the_bases_format(keys: Keys, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_model, tmp_path / "half")
    import torch

    AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.bfloat16).save_pretrained(str(tmp_path / "half"))
    given = keys(model_name_or_path=str(tmp_path / "half"), finetuning_type="full")
    finery.train(given)
    weights = load_file(finery.export(given) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_full_run_needs_its_base_no_more(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = keys(finetuning_type="full")
    finery.train(given)
    said = finery.chat(given | {"model_name_or_path": "org/gone", "max_new_tokens": 2}, [{"role": "user", "content": "Hi"}])
    assert isinstance(said, str)


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [([], "should end with"), ([{"role": "sytem", "content": "x"}], "should have a 'role'"), ([{"role": "user"}], "a text as 'content'")],
)
def test_messages_from_python_are_checked(messages: list[dict[str, str]], wanted: str, keys: Keys) -> None:
    with pytest.raises(UserError, match=wanted):
        finery.chat(keys(), messages)


def test_columns_that_the_stage_does_not_read(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "kto.json").write_text(json.dumps([{"instruction": "a", "output": "b", "label": False}]))
    entries = {"kto": {"file_name": "kto.json", "columns": {"kto_tag": "label"}, "file_sha1": "0"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="'kto_tag' that this stage does not read"):
        finery.train(keys(dataset="kto", dataset_dir=str(tmp_path)))


def test_a_key_of_old_registries_is_told_and_passed_over(
    keys: Keys, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(data_dir / "sums.json", tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "sums.json", "file_sha1": "0"}}))
    finery.train(keys(dataset_dir=str(tmp_path)))
    assert "'file_sha1' in dataset_info.json is read by nothing" in capsys.readouterr().err
    (tmp_path / "dataset_info.json").write_text(json.dumps({"sums": {"file_nam": "sums.json"}}))
    with pytest.raises(UserError, match="did you mean 'file_name'"):
        finery.train(keys(dataset_dir=str(tmp_path)))


def test_the_bar_shows_loss_speed_and_time_left(keys: Keys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    finery.train(keys(max_steps=3))
    told = capsys.readouterr().err
    assert "3/3" in told
    assert "tokens/s" in told
    assert "left" in told
    assert "loss 5." in told or "loss 6." in told
    assert told.count("\x1b[?25l") == told.count("\x1b[?25h") > 0


def test_the_cursor_comes_back_after_a_failure(keys: Keys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("finery.training.trainer.Trainer.training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finery.train(keys())
    told = capsys.readouterr().err
    assert told.count("\x1b[?25l") == told.count("\x1b[?25h") > 0
