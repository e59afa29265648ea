"""A model that says what it is told to, for talks."""

from pathlib import Path
from typing import Any

import pytest

from finery.run import Run
from finery.talks.speaker import Speaker
from serving import Scripted, template_for

CALL = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
SCRIPT = {
    "hello": "Hi there, 你好! 🙂",
    "think": "<think>\nTwo and two.\nReally.\n</think>\n\nFour.",
    "only thought": "<think>\nTwo and two",
    "weather": f"Hm. {CALL.format('Rome')}\n{CALL.format('Oslo')}",
    "-8": "Oslo.",
    "count": " ".join(map(str, range(500))),
}


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """The tiny tokenizer, with tokens for thoughts."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(str(tiny_model))
    found.add_tokens(["<think>", "</think>"])
    return found


@pytest.fixture
def speaker(tokenizer: Any) -> Speaker:
    template = template_for(tokenizer, "qwen3")
    run = Run.from_dict({"model_name_or_path": "some/model", "template": "qwen3", "max_new_tokens": 3000})
    return Speaker(Scripted(template, dict(SCRIPT), longest=6000), template, run)
