"""The pages about serving: their examples run, and their tables list what the code has."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finery.serve.protocol import ChatRequest, CompletionRequest
from finery.serve.service import NUMBERS, Settings
from serving import PLAIN, Running, Scripted, running, template_for

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["serving.md", "serving_zh.md"]
ANSWERS = {
    "Hello!": "Hello, I am your model.",
    "weather in Rome?": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    "18 degrees": "It is 18 degrees in Rome.",
    "Make up a person.": '{"name": "Ada", "age": 36}',
}
SAID = {"bash": ["Hello, I am your model."], "javascript": ["Hello, I am your model."]}
SAID["python"] = ["Hello, I am your model.", "It is 18 degrees in Rome.", "name='Ada' age=36"]
PROGRAMS = {"bash": ["bash", "-c"], "javascript": ["node", "--input-type=module", "-e"], "python": [sys.executable, "-c"]}


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Running]:
    template = template_for(tokenizer, "qwen3")
    with running(Scripted(template, ANSWERS), template, Settings("my-model", PLAIN)) as found:
        yield found


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("language", SAID)
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, language: str, server: Running) -> None:
    needed = {"bash": "curl", "javascript": "node"}.get(language)
    if needed and shutil.which(needed) is None:
        pytest.skip(f"{needed} is not installed")
    found = blocks(page, language)
    assert len(found) == len(SAID[language])
    if page != PAGES[0]:
        assert found == blocks(PAGES[0], language), "both pages have the same examples: they have run"
        return
    for code, said in zip(found, SAID[language], strict=True):
        words = [*PROGRAMS[language], code.replace("http://127.0.0.1:8000", server.url)]
        told = subprocess.run(words, capture_output=True, text=True, timeout=180, check=False)
        assert told.returncode == 0 and said in told.stdout, told.stderr


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_complete(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    rows = [row.split("|") for row in text.splitlines() if row.startswith("| `")]
    fields = {name for row in rows if len(row) == 6 for name in re.findall(r"`(\w+)`", row[1])} - {"auto", "default"}
    assert fields == {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    variables = {name for row in rows if len(row) == 5 for name in re.findall(r"`([A-Z_]+)`", row[1])}
    known = {
        "API_HOST",
        "API_PORT",
        "API_KEY",
        "API_MODEL_NAME",
        "FASTAPI_ROOT_PATH",
        "API_VERBOSE",
        "FINERY_CORS_ORIGINS",
        "FINERY_API_HOSTS",
    }
    assert variables == known | NUMBERS.keys()
    for name, (field, _) in NUMBERS.items():
        if (default := getattr(Settings("m", PLAIN), field)) is not None:
            assert f"| `{name}` | {default:g} |".replace("4.1943e+06", "4194304") in text
