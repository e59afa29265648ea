"""The main job: on the tiny model for its form, on the real one for its meaning."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import finery
from finery.cli import main
from finery.commands import demo
from finery.commands.train import train
from finery.data.registry import PACKAGED
from finery.run import Run


def test_the_demo_shows_answers_before_and_after(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "demo_model", lambda: tiny_model)
    folder = tmp_path / "d"
    assert main(["demo", "--folder", str(folder), "--name", "Zoë", "--author", 'the "quoted" lab', "max_steps=2", "max_new_tokens=5"]) == 0
    out = capsys.readouterr().out
    assert all(question.split()[0] in out for question in demo.QUESTIONS)
    assert "before" in out
    assert "after" in out
    assert (folder / "lora" / "training_loss.png").exists()
    assert (folder / "lora-merged" / "model.safetensors").exists()
    settings = yaml.safe_load((folder / "demo.yaml").read_text())
    assert settings["placeholders"] == {"name": "Zoë", "author": 'the "quoted" lab'}
    assert main(["chat", str(folder / "demo.yaml"), "--prompt", "Hi", "max_new_tokens=3"]) == 0
    assert "taking the trained model in" in capsys.readouterr().err


def test_the_demo_does_not_write_into_a_foreign_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["demo", "--folder", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["identity", "alpaca_en_demo", "alpaca_zh_demo"])
def test_the_questions_outside_the_data_are_outside(name: str) -> None:
    records = json.loads((PACKAGED / f"{name}.json").read_text(encoding="utf-8"))
    asked = {record["instruction"].strip().lower() for record in records}
    assert not asked & {question.lower() for question in demo.QUESTIONS[2:]}
    assert name != "identity" or {question.lower() for question in demo.QUESTIONS[:2]} <= asked


@pytest.mark.real
def test_a_real_model_learns_its_new_name_and_keeps_it_when_exported(
    real_model: Path, tmp_path: Path, keys: Callable[..., dict[str, Any]]
) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        names = {"name": "Zelda", "author": "Ada Lab"}
        given = keys(
            model_name_or_path=str(real_model), dataset="identity", dataset_dir=str(PACKAGED), placeholders=names,
            max_samples=40, max_steps=24, lr_scheduler_type="cosine", warmup_ratio=0.1, do_sample=False, max_new_tokens=24,
        )  # fmt: skip
        train(Run.from_dict(given))
        question = [{"role": "user", "content": "Who are you?"}]
        tuned = finery.chat(given, question)
        merged = finery.export(given)
        exported = finery.chat({"model_name_or_path": str(merged), "do_sample": False, "max_new_tokens": 24}, question)
        assert "Zelda" in tuned
        assert "Zelda" in exported
        capital = [{"role": "user", "content": "What is the capital of France?"}]
        assert "Paris" in finery.chat({"model_name_or_path": str(merged), "do_sample": False, "max_new_tokens": 24}, capital)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.real
def test_the_demo_model_is_mended(real_model: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(real_model))
    assert tokenizer.tokenize("  1") == ["ĠĠ", "1"], "digits stand alone, and spaces before them together"
    assert tokenizer.tokenize("123") == ["1", "2", "3"]
    assert tokenizer.eos_token == "<|im_end|>"
    config = AutoConfig.from_pretrained(str(real_model))
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert not hasattr(config, "quantization_config")
    assert json.loads((real_model / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.slow
@pytest.mark.real
def test_the_whole_demo(real_model: Path, tmp_path: Path) -> None:
    """As a user runs it; what it prints at the end is what the README shows."""
    command = [sys.executable, "-m", "finery", "demo", "--folder", str(tmp_path / "d")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-2000:]
    state = json.loads((tmp_path / "d" / "lora" / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    chat = [
        sys.executable,
        "-m",
        "finery",
        "chat",
        str(tmp_path / "d" / "demo.yaml"),
        "--prompt",
        "Who are you?",
        "--prompt",
        "Who made you?",
    ]
    said = subprocess.run(chat, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "Finn" in said
    assert "Finery team" in said
