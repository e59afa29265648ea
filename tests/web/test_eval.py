"""The tab "Evaluate & predict": what it starts, and what it shows of results."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from background import own_jobs, submit, until
from boards import Drawn, drawn
from finery.jobs import find, jobs
from finery.jobs.job import Job, Status
from finery.web.answered import answers_page, scores_table
from finery.web.differences import marked
from finery.web.pages import evaluate
from finery.web.texts import LANGUAGES, texts
from finery.web.watching import Seen, bar

EVIL = '<img src=x onerror="hit()">'


@pytest.fixture
def tab(tmp_path: Path, tiny_model: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drawn]:
    """The tab in a folder of its own, with a model and data chosen."""
    monkeypatch.chdir(tmp_path)
    with own_jobs(tmp_path / "jobs", monkeypatch):
        page = drawn("eval", evaluate, tmp_path, tiny_model, data_dir)
        page.held |= {"top.model_name": "Custom", "top.model_path": str(tiny_model), "eval.dataset_dir": str(data_dir)}
        page.held |= {"eval.dataset": ["names"], "eval.max_new_tokens": 8, "eval.max_samples": "4"}
        yield page


def keys_of(page: Drawn, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load(page.press("eval.cmd_preview_btn", **changes)["eval.file"]["value"])


def finished_run(home: Path, name: str, **files: str) -> Path:
    """A folder as a run of the tiny model leaves it."""
    folder = home / "saves" / "tiny" / "lora" / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def line(prompt: str = "Who?", predict: str = "I am new.", label: str = "I am old.") -> str:
    return json.dumps({"prompt": prompt, "predict": predict, "label": label}) + "\n"


ADAPTER = {"adapter_config__json": "{}", "adapter_model__safetensors": ""}
RESULT = {"predict_results__json": '{"predict_bleu-4": 12.5, "predict_runtime": 3}', "generated_predictions__jsonl": line()}


# ------------------------------------------------------------------ what is started


def test_the_keys_of_a_run(tab: Drawn) -> None:
    keys = keys_of(tab, eval__more="do_sample: false")
    assert re.fullmatch(r"saves/tiny/lora/eval_[\d-]+", keys.pop("output_dir"))
    assert keys == {
        "model_name_or_path": tab.held["top.model_path"],
        "finetuning_type": "lora",
        "dataset_dir": tab.held["eval.dataset_dir"],
        "eval_dataset": ["names"],
        "cutoff_len": 1024,
        "max_samples": 4,
        "per_device_eval_batch_size": 2,
        "do_predict": True,
        "predict_with_generate": True,
        "max_new_tokens": 8,
        "top_p": 0.7,
        "temperature": 0.95,
        "stage": "sft",
        "do_sample": False,
    }
    only_loss = keys_of(tab, eval__predict="false")
    assert only_loss["do_eval"] is True
    assert not {"do_predict", "max_new_tokens", "top_p"} & only_loss.keys()


def test_the_newest_finished_run_is_taken_unless_told_otherwise(tab: Drawn, tmp_path: Path) -> None:
    assert "adapter_name_or_path" not in keys_of(tab)
    assert "as it came" in tab.press("eval.newest", "change")["eval.source"]
    shutil.copytree(finished_run(tmp_path, "halfway") / ".", tmp_path / "saves/tiny/lora/halfway/checkpoint-5", dirs_exist_ok=True)
    for name, text in ADAPTER.items():
        (tmp_path / "saves/tiny/lora/halfway/checkpoint-5" / name.replace("__", ".")).write_text(text)
    assert keys_of(tab)["adapter_name_or_path"] == ["saves/tiny/lora/halfway/checkpoint-5"], "nothing has finished"
    finished_run(tmp_path, "old", **ADAPTER)
    assert keys_of(tab)["adapter_name_or_path"] == ["saves/tiny/lora/old"], "checkpoints of an unfinished run are not taken unasked"
    assert "saves/tiny/lora/old" in tab.press("eval.newest", "change")["eval.source"]
    chosen = ["saves/tiny/lora/halfway/checkpoint-5"]
    assert keys_of(tab, top__checkpoint_path=chosen)["adapter_name_or_path"] == chosen
    assert "adapter_name_or_path" not in keys_of(tab, top__checkpoint_path=[], eval__newest=False)


def test_settings_come_back_from_a_file(tab: Drawn, tmp_path: Path) -> None:
    finished_run(tmp_path, "old", **ADAPTER)
    before = keys_of(tab, eval__predict="false", eval__output_dir="mine", eval__more="report_to: none\nstage: pt")
    tab.press("eval.arg_save_btn", eval__config_path="kept")
    changed = keys_of(tab, eval__predict="true", eval__dataset=["sums"], eval__output_dir="", eval__more="", eval__newest=False)
    assert changed != before
    tab.press("eval.arg_load_btn", eval__config_path="kept.yaml")
    assert tab.held["top.checkpoint_path"] == ["saves/tiny/lora/old"]
    assert keys_of(tab) == before


def test_a_file_of_a_training_starts_none(tab: Drawn, tmp_path: Path) -> None:
    (tmp_path / "board").mkdir()
    (tmp_path / "board" / "train.yaml").write_text("model_name_or_path: m\ndo_train: true\nplot_loss: true\ndataset: names\n")
    tab.press("eval.arg_load_btn", eval__config_path="train.yaml")
    assert not {"do_train", "plot_loss"} & keys_of(tab, eval__dataset=["names"]).keys()


def test_what_cannot_be_is_said_and_nothing_starts(tab: Drawn) -> None:
    faults: list[tuple[dict[str, Any], str]] = [
        ({"eval__dataset": []}, "no data set"),
        ({"eval__dataset": ["nonesuch"]}, "nonesuch"),
        ({"eval__dataset": ["names"], "eval__output_dir": "../../x/y"}, "outside"),
        ({"eval__output_dir": "", "top__model_path": ""}, "no model"),
    ]
    for changes, words in faults:
        with pytest.raises(gr.Error, match=words):
            tab.press("eval.start_btn", **changes)
    tab.board.is_demo = True
    with pytest.raises(gr.Error, match="demonstration"):
        tab.press("eval.start_btn", top__model_path="m")
    assert jobs() == []


@pytest.mark.slow
def test_a_run_answers_and_its_result_comes_by_itself(tab: Drawn) -> None:
    """Started as a click does, in a process of its own; scores and answers are then shown, also to a window that opens later."""
    tab.press("eval.start_btn")
    job = find(tab.held["eval.job"])
    assert (job.name or "").startswith("eval-eval_")
    assert job.output_dir is not None
    tab.press("eval.job", "change")
    assert tab.held["eval.scores"] == ""
    until(lambda: job.status().has_ended, 300)
    assert job.status().state == "finished", list(job.lines())
    tab.press("eval.progress", "change")
    assert tab.held["eval.result_of"] == job.output_dir
    assert "predict_bleu-4" in tab.held["eval.scores"]
    assert "4 answers" in tab.held["eval.answers"]
    assert tab.press("eval.progress", "change") == {}, "nothing is sent again while nothing changes"
    tab.held |= {"eval.job": None, "eval.followed": "", "eval.result_of": None, "eval.scores": ""}
    tab.press("tabs.eval", "select")
    assert "predict_bleu-4" in tab.held["eval.scores"]


# ------------------------------------------------------------------ what is shown


def test_a_named_folder_shows_its_result_again(tab: Drawn, tmp_path: Path) -> None:
    finished_run(tmp_path, "eval_one", **RESULT)
    finished_run(tmp_path, "eval_two", **RESULT | {"predict_results__json": '{"predict_bleu-4": 99.5}'})
    tab.press("tabs.eval", "select")
    assert tab.held["eval.result_of"] in ("saves/tiny/lora/eval_one", "saves/tiny/lora/eval_two")
    tab.press("eval.output_dir", "change", eval__output_dir="eval_two")
    assert tab.held["eval.result_of"] == "saves/tiny/lora/eval_two"
    assert "99.5" in tab.held["eval.scores"]
    tab.press("eval.result_of", "input", eval__result_of="saves/tiny/lora/eval_one")
    assert "12.5" in tab.held["eval.scores"]
    assert tab.press("eval.output_dir", "change", eval__output_dir="eval_new") == {}


def test_a_job_without_a_result_shows_none_of_others(tab: Drawn, tmp_path: Path) -> None:
    folder = finished_run(tmp_path, "eval_one", **RESULT)
    tab.press("tabs.eval", "select")
    assert tab.held["eval.scores"]
    job = submit("raise SystemExit(3)", cwd=tmp_path, output_dir="saves/tiny/lora/eval_new", name="eval-new")
    until(lambda: job.status().has_ended, 60)
    tab.press("eval.job", "change", eval__job=job.id)
    assert (tab.held["eval.result_of"], tab.held["eval.scores"]) == (None, "")
    tab.press("eval.result_of", "input", eval__result_of=str(folder.relative_to(tmp_path)))
    assert tab.press("eval.progress", "change") == {}, "who looks at another result is left in peace"


def test_answers_go_page_by_page(tab: Drawn, tmp_path: Path) -> None:
    lines = "".join(line(prompt=f"question {number}") for number in range(12)) + '{"prompt": "half'
    finished_run(tmp_path, "eval_one", generated_predictions__jsonl=lines, generated_predictions_b__jsonl=line(predict="of b"))
    tab.press("eval.result_of", "input", eval__result_of="saves/tiny/lora/eval_one")
    assert "question 4" in tab.held["eval.answers"]
    assert "question 5" not in tab.held["eval.answers"]
    tab.press("eval.answers_next_btn")
    assert "question 5" in tab.held["eval.answers"]
    tab.press("eval.answers_next_btn")
    tab.press("eval.answers_next_btn")
    assert tab.held["eval.answers_page"] == 2
    assert "question 11" in tab.held["eval.answers"]
    tab.press("eval.answers_of", "input", eval__answers_of="generated_predictions_b.jsonl")
    assert "of" in tab.held["eval.answers"]
    assert tab.held["eval.answers_page"] == 0


def test_texts_of_data_and_models_are_shown_as_text(tab: Drawn, tmp_path: Path) -> None:
    results = json.dumps({EVIL: EVIL, "predict_bleu-4": 1})
    finished_run(tmp_path, "eval_one", all_results__json=results, generated_predictions__jsonl=line(EVIL, EVIL, f"</pre>{EVIL}"))
    tab.press("eval.result_of", "input", eval__result_of="saves/tiny/lora/eval_one")
    for shown in (tab.held["eval.answers"], tab.held["eval.scores"]):
        assert "&lt;img" in shown
        assert "<img" not in shown


def test_only_what_lies_inside_is_read(tab: Drawn, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "generated_predictions.jsonl").write_text(line(predict="secret"))
    with pytest.raises(gr.Error, match="outside"):
        tab.press("eval.result_of", "input", eval__result_of=str(outside))
    link = finished_run(tmp_path, "eval_one") / "generated_predictions.jsonl"
    link.symlink_to(outside / "generated_predictions.jsonl")
    with pytest.raises(gr.Error, match="outside"):
        tab.press("eval.result_of", "input", eval__result_of="saves/tiny/lora/eval_one")
    with pytest.raises(gr.Error, match="no result"):
        tab.press("eval.result_of", "input", eval__result_of="saves")
    for name in ("/etc", "../..", "a\0b"):
        with pytest.raises(gr.Error, match=r"outside|no path"):
            tab.press("eval.result_of", "input", eval__result_of=name)


def test_a_result_that_cannot_be_read_is_said(tab: Drawn, tmp_path: Path) -> None:
    finished_run(tmp_path, "eval_one", predict_results__json="{")
    with pytest.raises(gr.Error, match="cannot be read"):
        tab.press("eval.result_of", "input", eval__result_of="saves/tiny/lora/eval_one")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_says_all_of_it(language: str, tmp_path: Path) -> None:
    path = tmp_path / "generated_predictions.jsonl"
    path.write_text(line() + line(predict="I am old."))
    shown, _ = answers_page(path, 0, texts(language))
    assert shown.count('class="same"') == 1
    assert scores_table({"eval_loss": 0.5}, texts(language)).count("<tr") == 2
    job = Job(tmp_path, [], [], str(tmp_path), None, ["cpu"], "eval-x", 0.0)
    seen = Seen(job, Status("running", began=1.0), [], ["answering eval b: 1,500 samples of 3,000 samples, 2 samples a second"])
    assert 'aria-valuenow="50"' in bar(seen, texts(language))


# ------------------------------------------------------------------ differences


@given(st.text("ab <&\n你", max_size=30), st.text("ab <&\n你", max_size=30))
@settings(deadline=None)  # a busy machine may let any of them wait
def test_marks_change_no_letter(one: str, other: str) -> None:
    for before, after in zip((one, other), marked(one, other), strict=True):
        assert html.unescape(re.sub("</?mark>", "", after)) == before
    assert ("<mark>" in "".join(marked(one, other))) == (one != other)


def test_what_only_one_side_has_is_marked() -> None:
    assert marked("I am Finn, made here.", "I am Bob, made here.") == (
        "I am <mark>Finn</mark>, made here.",
        "I am <mark>Bob</mark>, made here.",
    )
    assert marked("我是猫", "我是狗") == ("我是<mark>猫</mark>", "我是<mark>狗</mark>")
    assert marked("a b c", "x y c") == ("<mark>a b</mark> c", "<mark>x y</mark> c")
    long = "word " * 4000
    assert "<mark>" not in "".join(marked(long, long + "more"))


def test_jobs_that_are_gone_change_nothing(tab: Drawn) -> None:
    assert tab.press("eval.job", "change", eval__job="nonesuch").keys() <= {"eval.progress"}
