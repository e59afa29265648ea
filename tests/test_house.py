"""The rules of the house, kept by a test instead of by memory."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from finery.registry import Registry

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "finery"
FLOORS = [  # a room may import from floors below its own, and from nowhere else; the ground may import itself
    ["errors", "options", "reader", "registry", "log", "compat", "files", "hub", "upload", "addresses"],
    ["data", "models"],
    ["methods"],
    ["training", "engines", "exports"],
    ["run", "launch"],
    ["checks", "previews", "parity", "predictions", "serve", "talks", "jobs", "keys"],
    ["web"],
    ["commands"],
    ["cli"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(HOUSE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))
REGISTRIES = [
    "methods",
    "engines",
    "models.adapters",
    "models.kernels",
    "models.quantizers",
    "data.formats",
    "data.rows",
    "training.callbacks",
    "training.optimizers",
    "exports",
    "checks",
]
FORBIDDEN = re.compile(r"(^|_)(utils?|misc|common|helpers?|extras?|managers?|custom|v2)(_|$)", re.I)
ENTRANCES = {"__init__", "__main__"}  # stand outside the floors: they only pass on


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("finery."):
            yield node.module.split(".")[1]
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("finery."))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    if here in ENTRANCES:
        return
    rooms = {other for other in imported_rooms(path) if other != here}
    assert rooms <= FLOOR_OF.keys(), "a new room needs a floor"
    up = [other for other in rooms if FLOOR_OF[other] >= FLOOR_OF[here] > 0 or (FLOOR_OF[here] == 0 < FLOOR_OF[other])]
    assert not up, f"{here} (floor {FLOOR_OF[here]}) reaches to {up}"


def test_every_room_has_a_floor() -> None:
    rooms = {room(path) for path in FILES} - ENTRANCES
    assert rooms == FLOOR_OF.keys()


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=name_of)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_function_is_annotated(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.returns is not None, f"{node.name} does not say what it returns"
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            missing = [arg.arg for arg in every if arg.annotation is None and arg.arg not in ("self", "cls")]
            assert not missing, f"{node.name}: {missing}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_and_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a file says in one line what it is"
    assert not FORBIDDEN.search(path.stem)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            assert not FORBIDDEN.search(node.name), node.name
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node in public_functions(tree):
            assert ast.get_docstring(node), f"{node.name} is public and says nothing"


def public_functions(tree: ast.Module) -> list[ast.AST]:
    methods = [inner for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") for inner in node.body]
    return [*tree.body, *methods]


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_part_is_one_file_with_one_class(kind: str) -> None:
    registry = Registry(f"finery.{kind}")
    assert registry.names()
    for name in registry.names():
        module = import_module(f"finery.{kind}.{name}")
        assert len(module.__all__) == 1
        assert registry[name] is getattr(module, module.__all__[0])
        assert registry.says(name), f"{name}: the first line of the docstring is its help"


@pytest.mark.parametrize("kind", REGISTRIES)
def test_listing_parts_imports_none(kind: str) -> None:
    list_all = f"r = Registry('finery.{kind}'); names = r.names(); [r.says(n) for n in names]"
    imported = f"[m for m in sys.modules if any(m == 'finery.{kind}.' + n for n in names)]"
    code = f"import sys; from finery.registry import Registry; {list_all}; print({imported})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_story_of_training_stays_on_one_screen() -> None:
    tree = ast.parse((HOUSE / "commands" / "train.py").read_text(encoding="utf-8"))
    story = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert story.end_lineno is not None
    assert story.end_lineno - story.lineno <= 40


def test_no_part_is_asked_for_its_name() -> None:
    """`if stage == "dpo"` would be a second place to edit for a new method."""
    names = {name for kind in ("methods", "models.adapters", "engines") for name in Registry(f"finery.{kind}").names()}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                asked = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
                assert not asked & names, f"{name_of(path)}:{node.lineno}"


HEAVY = {"torch", "transformers", "pydantic", "yaml", "numpy", "datasets", "peft", "rich", "matplotlib"}


@pytest.mark.parametrize("words", [["--help"], ["help"], ["version"], ["--version"], []])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from finery.cli import main; main({words}); print([m for m in {sorted(HEAVY)} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, finery; print([m for m in {sorted(HEAVY)} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_nothing_pickled_is_written_or_read() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\.|torch\.(save|load)\(", text), name_of(path)
