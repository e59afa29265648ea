"""Accuracy in evaluations: the mean over rows of the share of learnt tokens that are the likeliest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finery
from conftest import RECORDS
from finery.training.accuracy import Accuracy

Keys = Callable[..., dict[str, Any]]


def by_hand(model_folder: Path) -> float:
    """Row by row, with the model's own forward."""
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModelForCausalLM.from_pretrained(model_folder).eval()
    shares = []
    for record in RECORDS:
        prompt = f"<|im_start|>user\n{record['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        before, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt}{record['output']}<|im_end|>")["input_ids"]
        with torch.no_grad():
            guesses = model(input_ids=torch.tensor([whole])).logits[0, :-1].argmax(-1)
        hits = guesses[len(before) - 1 :] == torch.tensor(whole[len(before) :])
        shares.append(float(hits.float().mean()))
    return sum(shares) / len(shares)


def evaluated(keys: Keys, **changes: Any) -> dict[str, float]:
    given = keys(do_train=False, do_eval=True, dataset=None, eval_dataset="sums", compute_accuracy=True, **changes)
    return json.loads((finery.train(given) / "eval_results.json").read_text())


def test_against_the_model_s_own_forward(keys: Keys, tiny_model: Path) -> None:
    wanted = by_hand(tiny_model)
    assert evaluated(keys)["eval_accuracy"] == pytest.approx(wanted, abs=1e-6)
    plainly = {"head_loss": False, "packed_attention": False, "per_device_eval_batch_size": 5, "micro_batches_at_once": 2}
    assert evaluated(keys, **plainly)["eval_accuracy"] == pytest.approx(wanted, abs=1e-6)


def test_predicting_tells_it_too(keys: Keys) -> None:
    given = keys(do_train=False, do_predict=True, dataset=None, eval_dataset="sums", compute_accuracy=True)
    folder = finery.train(given)
    predicted, measured = (json.loads((folder / f"{split}_results.json").read_text()) for split in ("predict", "eval"))
    for name in ("loss", "accuracy"):
        assert predicted[f"predict_{name}"] == measured[f"eval_{name}"]


def test_the_best_is_the_highest(keys: Keys) -> None:
    worse = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    rate = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "finetuning_type": "full", "plot_loss": True}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "compute_accuracy": True}
    folder = finery.train(keys(**worse, **rate, **best))
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    measured = {line["current_steps"]: line["eval_accuracy"] for line in log if "eval_accuracy" in line}
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_metric"] == max(list(measured.values())[:4])
    assert (folder / "training_eval_accuracy.png").exists()
    assert json.loads((folder / "eval_results.json").read_text())["eval_accuracy"] == state["best_metric"]


def test_rows_count_the_same_on_all_ranks() -> None:
    accuracy = Accuracy(wanted=True)
    accuracy._shares = [1.0, 0.0, 0.5]
    assert accuracy.told("eval", lambda value: 2 * value) == {"eval_accuracy": 0.5}
    assert Accuracy(wanted=False).told("eval", lambda value: value) == {}
