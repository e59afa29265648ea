"""docs/templates.md: the proof says what the page says, and its translation shows the same."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from finery.cli import main

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE, TRANSLATION = ((DOCS / name).read_text(encoding="utf-8") for name in ("templates.md", "templates_zh.md"))


def blocks(page: str, kind: str) -> list[str]:
    """Its examples in one language."""
    return [text for language, text in BLOCK.findall(page) if language == kind]


def timeless(text: str) -> str:
    """Without seconds, which differ from run to run."""
    return re.sub(r" in \d+\.\d s", " in N s", text)


@pytest.mark.real
@pytest.mark.parametrize(("number", "template"), [(0, "auto"), (1, "alpaca")])
def test_the_proof_says_what_the_page_says(
    number: int, template: str, real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (talks,) = blocks(PAGE, "json")
    Path("talks.jsonl").write_text(talks)
    words = [f"model_name_or_path={real_model}", "output_dir=out", "do_train=true", "dataset=talks.jsonl", f"template={template}"]
    assert main(["check", *words]) == 1
    assert timeless(capsys.readouterr().out) == timeless(blocks(PAGE, "text")[number])


@pytest.mark.parametrize("kind", ["json", "text", "yaml"])
def test_the_translation_shows_the_same(kind: str) -> None:
    assert blocks(PAGE, kind) == blocks(TRANSLATION, kind) != []


def test_both_pages_tell_of_the_same_findings() -> None:
    rows: Callable[[str], list[str]] = lambda page: re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)  # noqa: E731 -- two words
    assert rows(PAGE)[-8:] == rows(TRANSLATION)[-8:]
