"""The tab "Export": what it starts, and how it shows whether an export is what was trained."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import yaml

from background import own_jobs, submit, until
from boards import Drawn, drawn
from finery.errors import UserError
from finery.exports.base import Limits
from finery.jobs import find, jobs, start
from finery.parity.answers import Distance
from finery.parity.report import Report
from finery.web.pages import export
from finery.web.parity_table import measures, read_report, report_page
from finery.web.texts import LANGUAGES, texts

EVIL = '<img src=x onerror="hit()">'
NEAR = Distance(1e-4, 1e-3, 0.04, 0.2, 0.99, 432)
TEXT = {"prompt": "Who?", "trained": "I am Finn.", "exported": "I am Finn."}
GOOD = Report("safetensors", "bfloat16", "float32", Limits(3e-2, (0.0, 1.2), 2e-5), 10, ids_equal=10, distance=NEAR, texts=[TEXT])
FULL = replace(GOOD, exact=replace(NEAR, mean_kl=1e-6), moved=NEAR, effect=0.99, as_trained=NEAR, notes=["half is lost"])
BAD = replace(FULL, distance=replace(NEAR, mean_kl=0.5), effect=2.0, faults=["its next tokens are far", EVIL])


@pytest.fixture
def tab(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drawn]:
    """The tab in a folder of its own, with a model chosen."""
    monkeypatch.chdir(tmp_path)
    with own_jobs(tmp_path / "jobs", monkeypatch):
        page = drawn("export", export, tmp_path, tiny_model)
        page.held |= {"top.model_name": "Custom", "top.model_path": str(tiny_model)}
        yield page


def keys_of(page: Drawn, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load(page.press("export.cmd_preview_btn", **changes)["export.file"]["value"])


def told(report: Report, **changes: Any) -> dict[str, Any]:
    """The report as its file has it."""
    return json.loads(json.dumps(report.told() | {"files": ["model.safetensors", "parity.json"]} | changes))


def put(folder: Path, report: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "parity.json").write_text(json.dumps(report))
    (folder / "model.safetensors").write_bytes(bytes(2_500_000))
    return folder


# ------------------------------------------------------------------ what is started


def test_the_keys_of_an_export(tab: Drawn, tmp_path: Path) -> None:
    keys = keys_of(tab, export__export_format="gguf", export__more="export_gguf_type: q8_0")
    assert re.fullmatch(r"exports/tiny-[\d-]+", keys.pop("export_dir"))
    plain = {"model_name_or_path": tab.held["top.model_path"], "finetuning_type": "lora", "export_format": "gguf"}
    assert keys == plain | {"export_size": 5, "export_device": "cpu", "export_gguf_type": "q8_0"}
    assert tab.held["export.command"].startswith("llamafactory-cli export \\\n")
    run = tmp_path / "saves" / "tiny" / "lora" / "one"
    run.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / name).touch()
    assert keys_of(tab)["adapter_name_or_path"] == ["saves/tiny/lora/one"]
    assert "adapter_name_or_path" not in keys_of(tab, export__newest=False)


def test_settings_come_back_from_a_file(tab: Drawn) -> None:
    changes = {"export__export_quantization_bit": "4", "export__export_quantization_dataset": "sums", "export__export_dir": "exports/mine"}
    before = keys_of(tab, export__newest=False, export__more="export_dtype: float16", **changes)
    assert (before["export_quantization_bit"], before["export_quantization_dataset"]) == (4, "sums")
    tab.press("export.arg_save_btn", export__config_path="kept")
    keys_of(tab, export__export_quantization_bit="none", export__export_dir="", export__more="", top__model_path="other")
    tab.press("export.arg_load_btn", export__config_path="kept.yaml")
    assert keys_of(tab) == before


def test_a_check_reads_the_export(tab: Drawn) -> None:
    assert "Nothing to mend" in tab.press("export.check_btn")["export.findings"]
    with pytest.raises(gr.Error, match="export_quantization_bit"):
        tab.press("export.check_btn", export__export_format="bnb", export__export_quantization_bit="3")


@pytest.mark.parametrize("place", ["/etc/x", "../x", "link/x", "~/x"])
def test_nothing_is_written_outside(tab: Drawn, tmp_path: Path, place: str) -> None:
    """Neither by the folder's own field nor by a key that is typed; also through a link, to what is not there yet."""
    (tmp_path / "link").symlink_to(tmp_path.parent)
    for changes in ({"export__export_dir": place}, {"export__export_dir": "", "export__more": f"export_dir: {json.dumps(place)}"}):
        with pytest.raises(gr.Error, match="outside"):
            tab.press("export.start_btn", **changes)
    tab.board.is_demo = True
    with pytest.raises(gr.Error, match="demonstration"):
        tab.press("export.start_btn", export__export_dir="exports/fine", export__more="")
    assert jobs() == []


@pytest.mark.slow
def test_an_export_is_a_job_and_its_report_comes_by_itself(tab: Drawn) -> None:
    """The model as it came, written and compared in a process of its own."""
    tab.press("export.start_btn", export__export_dir="exports/plain")
    job = find(tab.held["export.job"])
    assert (job.name, job.output_dir, job.slots) == ("export-plain", "exports/plain", ["cpu"])
    assert (job.command[3:5], Path(job.cwd)) == (["finery", "export"], tab.board.roots.home)
    until(lambda: job.status().has_ended, 300)
    assert job.status().state == "finished", list(job.lines())
    tab.press("export.progress", "change")
    assert tab.held["export.result_of"] == "exports/plain"
    assert "is what was trained" in tab.held["export.report"]
    assert "model.safetensors" in tab.held["export.report"]


def test_an_export_that_cannot_be_makes_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    with own_jobs(tmp_path / "jobs", monkeypatch):
        words = [f"model_name_or_path={tiny_model}", "export_dir=out", "export_format=nonesuch"]
        with pytest.raises(UserError, match="export_format"):
            start(words, tmp_path, verb="export")
        assert jobs() == []


# ------------------------------------------------------------------ what is shown


def test_a_failed_export_is_shown_as_failed(tab: Drawn, tmp_path: Path) -> None:
    """The report of what was put aside, not that of an earlier export to the same place."""
    put(tmp_path / "exports" / "one", told(GOOD))
    os.utime(tmp_path / "exports" / "one" / "parity.json", (1, 1))
    job = submit("raise SystemExit(1)", cwd=tmp_path, output_dir="exports/one", name="export-one")
    until(lambda: job.status().has_ended, 60)
    tab.press("export.job", "change", export__job=job.id)
    assert not tab.held["export.report"], "there is none yet"
    put(tmp_path / "exports" / "one-failed", told(BAD))
    tab.press("export.progress", "change")
    assert tab.held["export.result_of"] == "exports/one-failed"
    shown = tab.held["export.report"]
    assert "FAILED" in shown
    assert "is what was trained" not in shown
    assert shown.count('class="broken"') == 2
    assert "its next tokens are far" in shown
    assert "<img" not in shown
    assert "&lt;img" in shown


@pytest.mark.parametrize("report", [GOOD, FULL, BAD])
def test_the_table_says_what_the_log_says(report: Report) -> None:
    """As many lines, the same numbers."""
    lines = list(measures(told(report), texts("en")))
    logged = report.table().splitlines()
    assert len(lines) == len(logged)
    for line, text in zip(lines, logged, strict=True):
        for number in re.findall(r"[\d.]+(?:e-\d+)?%?", line.value):
            assert number in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_says_all_of_it(tmp_path: Path, language: str) -> None:
    folder = put(tmp_path / "one", told(FULL))
    shown = report_page(folder, read_report(folder / "parity.json"), texts(language))
    assert shown.count("<tr") == 11
    assert "half is lost" in shown
    assert "model.safetensors (2.5 MB)" in shown
    unverified = {"finery": "0", "form": "gguf", "verified": False, "files": []}
    assert "parity_unverified" in report_page(folder, unverified, texts(language))
    unread = replace(GOOD, ids_equal=0, distance=None, texts=[], faults=["it cannot be loaded"])
    assert "it cannot be loaded" in report_page(folder, told(unread), texts(language))


def test_texts_of_models_and_files_are_shown_as_text(tmp_path: Path) -> None:
    text = {"prompt": EVIL, "trained": EVIL, "exported": f"</pre>{EVIL}"}
    folder = put(tmp_path / EVIL.replace("/", ""), told(replace(GOOD, texts=[text], notes=[EVIL], form=EVIL), files=[EVIL, "../secret"]))
    (folder / EVIL).touch()
    shown = report_page(folder, read_report(folder / "parity.json"), texts("en"))
    assert "<img" not in shown
    assert "</pre>&lt;" not in shown
    assert "secret" not in shown


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"verified": 1}', '{"verified": true}', '{"verified": true, "passed": true, "form": "x"}']
)
def test_what_is_no_report_is_said(tab: Drawn, tmp_path: Path, text: str) -> None:
    (put(tmp_path / "exports" / "one", {}) / "parity.json").write_text(text)
    with pytest.raises(gr.Error, match=r"is no report|lacks"):
        tab.press("export.result_of", "input", export__result_of="exports/one")


def test_reports_outside_are_not_read(tab: Drawn, tmp_path: Path) -> None:
    outside = put(tmp_path.parent / f"{tmp_path.name}-outside", told(GOOD))
    (tmp_path / "exports" / "one").mkdir(parents=True)
    (tmp_path / "exports" / "one" / "parity.json").symlink_to(outside / "parity.json")
    for name in (str(outside), f"../{outside.name}", "exports/one"):
        with pytest.raises(gr.Error, match="outside"):
            tab.press("export.result_of", "input", export__result_of=name)


def test_a_window_that_opens_later_shows_the_newest(tab: Drawn, tmp_path: Path) -> None:
    put(tmp_path / "exports" / "one", told(BAD))
    os.utime(tmp_path / "exports" / "one" / "parity.json", (1, 1))
    put(tmp_path / "exports" / "two", told(GOOD))
    tab.press("tabs.export", "select")
    assert tab.held["export.result_of"] == "exports/two"
    assert "is what was trained" in tab.held["export.report"]
    tab.board.language = "zh"
    tab.press("export.result_of", "input")
    assert "与训练所得一致" in tab.held["export.report"]
