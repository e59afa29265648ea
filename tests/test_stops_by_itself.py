"""What training, templates and saving are for: a model that learnt twenty chats answers them from its folder alone, and stops."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finery
from conftest import build_model

FAMILIES = ["auto", "llama3", "gemma", "mistral", "qwen3"]
"""The model's own template is ChatML; the others are named."""
WORDS = "the quick brown fox jumps over the lazy dog and I am a small model made for tests".split()  # noqa: SIM905 -- reads better
NUM_MORE = 5
"""So many tokens more or fewer than the reference answer are allowed."""


def chats() -> list[dict[str, Any]]:
    """Twenty conversations of one round or two, whose answers differ in words and in length."""
    found = []
    for number in range(20):
        name = chr(65 + number)
        answer = " ".join(WORDS[(number * 3 + step) % len(WORDS)] for step in range(1 + number % 6)) + "."
        messages = [{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": answer}]
        if number % 10 == 0:
            messages += [
                {"role": "user", "content": f"And then, {chr(65 + number)}?"},
                {"role": "assistant", "content": f"{chr(65 + number)} and no more."},
            ]
        found.append({"messages": messages})
    return found


ASKING = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for folder in sys.argv[2:]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    told = found[folder] = []
    for chat in json.load(open(sys.argv[1])):
        for place in range(1, len(chat["messages"]), 2):
            reference = tokenizer(chat["messages"][place]["content"], add_special_tokens=False)["input_ids"]
            asked = tokenizer.apply_chat_template(
                chat["messages"][:place], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            answer = model.generate(**asked, do_sample=False, max_new_tokens=len(reference) + 40)[0, asked["input_ids"].shape[1]:]
            told.append([len(answer), len(reference) + 1, tokenizer.decode(answer), chat["messages"][place]["content"]])
assert not any(name.startswith("finery") for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of each family: how many tokens came and were wanted, and both texts; asked by a process that knows transformers alone."""
    room = tmp_path_factory.mktemp("chats")
    (room / "chats.json").write_text(json.dumps(chats()))
    base = build_model(room / "base", hidden_size=128, intermediate_size=256)
    keys = {
        "model_name_or_path": str(base), "dataset": str(room / "chats.json"), "finetuning_type": "full", "do_train": True,
        "resize_vocab": True, "max_steps": 200, "per_device_train_batch_size": 20, "learning_rate": 3e-3, "logging_steps": 100,
        "lr_scheduler_type": "cosine", "save_strategy": "no", "report_to": "none", "cutoff_len": 512,
    }  # fmt: skip
    for family in FAMILIES:
        thinks = {"enable_thinking": False} if family == "qwen3" else {}  # else it learns to write an empty thought first
        finery.train({**keys, **thinks, "template": family, "output_dir": str(room / family)})
    folders = [str(room / family) for family in FAMILIES]
    command = [sys.executable, "-c", ASKING, str(room / "chats.json"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=room)
    assert done.returncode == 0, done.stderr
    return {Path(folder).name: told for folder, told in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_overfitted_model_stops_by_itself(family: str, answers: Callable[..., Any]) -> None:
    told = answers[family]  # type: ignore[index]
    assert len(told) == 22
    for size, wanted, said, reference in told:
        assert abs(size - wanted) <= NUM_MORE, (said, reference)
    assert sum(reference in said for _, _, said, reference in told) >= 20, "what was learnt is what is said"
