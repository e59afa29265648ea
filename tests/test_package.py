"""What is installed: the wheel holds the data files, startup is light, and the documents agree with the code."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "finery"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from this tree."""
    pytest.importorskip("hatchling", reason="building a wheel offline needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_every_file_of_the_package(wheel: list[str]) -> None:
    wanted = {str(path.relative_to(SOURCE.parent)) for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert wanted <= set(wheel)
    assert "finery/demo_data/identity.json" in wanted
    assert "finery/data/templates/llama3.yaml" in wanted


def test_the_wheel_holds_nothing_else(wheel: list[str]) -> None:
    assert all(name.startswith(("finery/", "finery-")) for name in wheel)


def test_a_typo_is_answered_without_transformers(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model_name_or_path: a/b\nlora_rnak: 8\nlearnig_rate: 1e-4\n")
    code = f"import sys; from finery.cli import main; print(main(['train', {str(path)!r}]), 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "False"]
    assert "did you mean 'lora_rank'?" in result.stderr
    assert "did you mean 'learning_rate'?" in result.stderr


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "docs/architecture.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_in_documents_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{name} points to {target}"


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_settings_in_the_readme_are_real(name: str) -> None:
    from finery.run import Run

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        Run.from_dict(yaml.safe_load(block))


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_commands_in_the_readme_exist(name: str) -> None:
    from finery.commands import command_names

    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"^finery (\w+)", text, re.M)) <= set(command_names())
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"^make (\w+)", text, re.M)) <= verbs
    assert {"make demo", "make test"} <= set(re.findall(r"make \w+", text))
