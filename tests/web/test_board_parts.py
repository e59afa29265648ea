"""What stands behind the board's pages: places, saved settings, curves, past runs."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finery.errors import UserError
from finery.jobs import Job
from finery.jobs.job import Status
from finery.models.demo_model import demo_folder
from finery.web.curves import Curve, picture, ticks
from finery.web.named import DEMO, name_of
from finery.web.past import differing, overlaid, past_runs
from finery.web.roots import Roots
from finery.web.saves import checkpoints, load_settings, model_folder, output_dir, runs_of, save_settings, saved_settings
from finery.web.texts import texts
from finery.web.watching import Seen, bar, loss_curves, output, warnings

TOP = {"top.model_name": "Custom", "top.model_path": "models/Tiny-1B", "top.finetuning_type": "lora"}


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    home = tmp_path / "home"
    home.mkdir()
    return Roots([home.resolve()])


# ------------------------------------------------------------------ places


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "../x", "a/../../x", "~/x", "link/x", "..", "/proc/self/environ", "file:///etc/passwd", "a\0b"]
)
def test_places_outside_are_refused(roots: Roots, text: str) -> None:
    (roots.home / "link").symlink_to("/etc")
    with pytest.raises(UserError, match=r"outside of what this page may touch|names no path"):
        roots.path(text.removeprefix("file://"), "output_dir")
    with pytest.raises(UserError, match=r"outside of what this page may touch|names no path"):
        roots.look_at({"nested": {"key": [f"fine,{text}"]}, "dataset": text})


def test_links_inside_of_values_are_followed(roots: Roots) -> None:
    """Also where what they name is written as something that only goes down."""
    (roots.home / "link").symlink_to("/etc")
    with pytest.raises(UserError, match="outside"):
        roots.look_at({"dataset_dir": "link"})


def test_the_servers_environment_is_not_read(roots: Roots) -> None:
    with pytest.raises(UserError, match="write them out"):
        roots.look_at({"system": "${env:HOME}"})


def test_what_is_inside_passes(roots: Roots) -> None:
    roots.look_at({"model_name_or_path": "org/model", "output_dir": "saves/a", "learning_rate": 1e-4, "x": None, "note": "a, b and c"})
    assert roots.path("saves/../saves/a", "x") == roots.home / "saves/a"


# ------------------------------------------------------------------ saves


def test_runs_have_folders_of_their_own(roots: Roots) -> None:
    assert output_dir(TOP, "first", roots) == "saves/Tiny-1B/lora/first"
    assert output_dir(TOP, "elsewhere/first", roots) == "elsewhere/first"
    assert model_folder({**TOP, "top.model_path": str(demo_folder())}) == "SmolLM2-135M-Instruct"
    assert model_folder({**TOP, "top.model_name": DEMO}) == "Tiny-1B", "what is typed counts before it is named"
    assert model_folder({**TOP, "top.model_path": "x/<b>evil</b>/"}).isascii()
    with pytest.raises(UserError, match="give the run a name"):
        output_dir(TOP, " ", roots)
    with pytest.raises(UserError, match="outside"):
        output_dir(TOP, "../../../../../../x", roots)


def test_checkpoints_are_those_with_weights(roots: Roots) -> None:
    run = roots.home / "saves/Tiny-1B/lora/first"
    for folder in (run, run / "checkpoint-2", run / "checkpoint-10", run / "checkpoint-12"):
        folder.mkdir(parents=True)
    for folder in (run, run / "checkpoint-2", run / "checkpoint-10"):
        (folder / "adapter_model.safetensors").touch()
        (folder / "adapter_config.json").touch()
    assert runs_of(roots, TOP) == ["first"]
    wanted = ["", "/checkpoint-2", "/checkpoint-10"]
    assert checkpoints(roots, TOP, adapters=True) == [f"saves/Tiny-1B/lora/first{end}" for end in wanted]
    assert checkpoints(roots, TOP, adapters=False) == []


def test_settings_are_saved_and_loaded(roots: Roots) -> None:
    path = save_settings(roots, "mine", "a: 1\n")
    assert saved_settings(roots) == [path] == ["board/mine.yaml"]
    assert load_settings(roots, path) == load_settings(roots, "mine.yaml") == {"a": 1}


@pytest.mark.parametrize("name", ["", "a b", ".hidden", "a\nb", "x;y"])
def test_names_of_settings_are_plain(roots: Roots, name: str) -> None:
    with pytest.raises(UserError, match="is named by letters"):
        save_settings(roots, name, "")


def test_settings_never_leave_the_folder(roots: Roots) -> None:
    assert save_settings(roots, "../../evil", "a: 1\n") == "board/evil.yaml"
    with pytest.raises(UserError, match="outside"):
        load_settings(roots, "../../etc/passwd")
    (roots.home / "board/list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="lines of 'key: value'"):
        load_settings(roots, "list.yaml")


# ------------------------------------------------------------------ curves


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.2), (-3, 1700), (1e-5, 1.1e-5), (5, 5.0001)])
def test_ticks_are_round_and_cover(low: float, high: float) -> None:
    found = ticks(low, high)
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}
    assert steps == {1.0}
    assert found[0] <= low + 1e-9 * abs(low)
    assert found[-1] >= high - 1e-9 * abs(high)
    assert 3 <= len(found) <= 12


def test_a_picture_shows_every_point() -> None:
    points = [(step, 2.0 - step / 10) for step in range(1, 11)]
    drawn = picture("Loss", [Curve("a<b", points, "c0"), Curve("none", [], "c1")], "nothing")
    places = re.search(r'class="c0"><path d="M([^"]+)"', drawn)
    assert places is not None
    xs, ys = zip(*[map(float, place.split()) for place in places[1].split("L")], strict=True)
    assert len(xs) == len(points)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys), "SVG counts downwards: a loss that falls goes down"
    assert "a&lt;b: 1" in drawn
    assert "none" not in drawn


@pytest.mark.parametrize("points", [[], [(1, math.nan)], [(1, math.inf)]])
def test_of_no_point_that_is_said(points: Any) -> None:
    assert "nothing yet" in picture("Loss", [Curve("a", points, "c0")], "nothing yet")


def test_one_point_is_a_picture() -> None:
    assert "<svg" in picture("Loss", [Curve("a", [(1, 0.0)], "c0")], "")


# ------------------------------------------------------------------ jobs


def job(folder: Path, **changes: Any) -> Job:
    facts = {"words": [], "command": [], "cwd": str(folder), "output_dir": "out", "slots": ["cpu"], "name": "train-x", "created": 0.0}
    return Job(folder=folder, **(facts | changes))


def seen(folder: Path, state: Any = "running", lines: Any = (), text: Any = ()) -> Seen:
    return Seen(job(folder), Status(state, why="<b>why</b>"), lines, text)


def test_what_is_shown_of_a_job_is_text(tmp_path: Path) -> None:
    one = seen(tmp_path, text=["<script>alert(1)</script> warning: x", "fine"])
    for drawn in (bar(one, texts("en")), warnings(one), output(one)):
        assert "<script>" not in drawn
        assert "<b>" not in drawn
    assert "&lt;script&gt;" in warnings(one)
    assert "fine" not in warnings(one)


def test_the_bar_tells_the_last_values(tmp_path: Path) -> None:
    lines = [{"current_steps": 1, "total_steps": 4, "loss": 2.0}, {"current_steps": 2, "total_steps": 4, "eval_loss": 1.5}]
    drawn = bar(seen(tmp_path, lines=lines), texts("en"))
    assert "loss 2.0000" in drawn
    assert "evaluation loss 1.5000" in drawn
    named = {curve.name: curve.points for curve in loss_curves(lines, texts("en"))}
    assert named == {"as measured": [(1, 2.0)], "smoothed": [(1, 2.0)], "evaluation": [(2, 1.5)]}


# ------------------------------------------------------------------ past runs


@pytest.fixture
def two_runs(roots: Roots, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Roots:
    monkeypatch.setenv("FINERY_JOBS", str(tmp_path / "jobs"))
    for name, rate in (("one", "1e-4"), ("two", "2e-4")):
        folder = roots.home / "saves/m/lora" / name
        folder.mkdir(parents=True)
        lines = [{"current_steps": step, "total_steps": 3, "loss": 3.0 - step} for step in (1, 2, 3)]
        (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
        (folder / "run.yaml").write_text(f"learning_rate: {rate}\nseed: 1\ndataset: [{name}]\n")
    return roots


def test_runs_of_the_past_are_compared(two_runs: Roots) -> None:
    found = {run.folder.name: run for run in past_runs(two_runs)}
    assert found["one"].row[3:] == ["3/3", "0.0000", ""]
    assert [[len(curve.points), curve.look] for curve in overlaid(list(found.values()))] == [[3, "c0"], [3, "c1"]]
    assert differing(found["one"], found["two"]) == [["learning_rate", "1e-4", "2e-4"], ["dataset", '["one"]', '["two"]']]


def test_paths_are_called_as_the_list_calls_them() -> None:
    assert name_of(str(demo_folder()), "Custom") == DEMO
    assert name_of("Qwen/Qwen3-8B", DEMO) == name_of("Qwen/Qwen3-8B") != "Custom"
    assert name_of("Qwen/Qwen3-8B", name_of("Qwen/Qwen3-8B")) == name_of("Qwen/Qwen3-8B")
    assert name_of("models/mine", DEMO) == name_of(None) == name_of("") == "Custom"


# ------------------------------------------------------------------ start


def test_the_page_is_built_without_torch(tmp_path: Path) -> None:
    """Which takes as long to import as the page takes to be drawn."""
    code = "import sys; from finery.web.app import build; from finery.web.board import Board; from finery.web.roots import Roots\n"
    code += "from pathlib import Path; build(Board(Roots([Path.cwd()]))); print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "set()\n"
