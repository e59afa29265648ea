"""SwanLab: what its package is told, that no secret is written or told, and what is needed."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finery.errors import UserError
from finery.run import Run
from watched import Bench


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


SWANLAB = """
calls = []
run = None
class Run:
    id, url, config = "swan1", "https://swanlab.example/run", {}
class Callback:
    pass
def init(*, callbacks, **how):
    global run
    if "secret" in str(how): raise RuntimeError("a secret was given to init")
    run = Run()
    calls.append(("init", how))
def get_run():
    if run is None: raise RuntimeError("no active run")
    return run
def login(api_key=None, relogin=False, host=None, save=False, timeout=10):
    calls.append(("login", {"api_key": api_key, "save": save}))
    if api_key == "wrong_key": raise ConnectionError(f"{api_key} is not known")
def merge_callbacks(callbacks):
    calls.append(("merge_callbacks", vars(callbacks)))
def log(data, step=None):
    get_run()
    calls.append(("log", {"step": step, **data}))
"""
LARK = """
class LarkCallback:
    def __init__(self, webhook_url, secret=None, language="zh"):
        self.webhook_url, self.secret = webhook_url, secret
"""
CALLBACK = """
import swanlab
from transformers import TrainerCallback
class SwanLabCallback(swanlab.Callback, TrainerCallback):
    def __init__(self, *, project=None, workspace=None, experiment_name=None, description=None, log_dir=None, mode=None, tags=None):
        given = {"project": project, "workspace": workspace, "experiment_name": experiment_name, "log_dir": log_dir, "mode": mode}
        self.how = {name: value for name, value in given.items() if value is not None}
    def setup(self):
        if swanlab.run is None: swanlab.init(callbacks=[self], **self.how)
    def on_train_begin(self, args, state, control, model=None, **_): self.setup()
    def on_log(self, args, state, control, model=None, logs=None, **_):
        self.setup()
        swanlab.log(dict(logs), step=state.global_step)
    def on_evaluate(self, args, state, control, metrics=None, **_): swanlab.log(dict(metrics), step=state.global_step)
    def on_save(self, args, state, control, **_): swanlab.get_run().config["last"] = state.global_step
"""


@pytest.fixture
def swanlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package with the interface of swanlab 0.10.3, as far as it is used."""
    files = {"__init__.py": SWANLAB, "plugin/notification/__init__.py": LARK, "integration/transformers.py": CALLBACK}
    for name, text in files.items():
        path = tmp_path / "packages/swanlab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    yield __import__("swanlab")
    for name in [name for name in sys.modules if name.partition(".")[0] == "swanlab"]:
        del sys.modules[name]


SECRETS: dict[str, Any] = {
    "swanlab_api_key": "very_secret_key",
    "swanlab_lark_webhook_url": "https://secret.example",
    "swanlab_lark_secret": "lark_secret",
}


def told(swanlab: Any, name: str) -> list[dict[str, Any]]:
    return [how for called, how in swanlab.calls if called == name]


def test_swanlab_gets_the_run(bench: Bench, swanlab: Any) -> None:
    run = bench.train(use_swanlab=True, report_to="swanlab, none", val_size=4, swanlab_workspace="us", **SECRETS)
    assert not run.complaint and "the tracker" not in run.said
    assert [name for name, _ in swanlab.calls[:3]] == ["login", "merge_callbacks", "init"]
    assert told(swanlab, "login") == [{"api_key": "very_secret_key", "save": False}]
    assert told(swanlab, "merge_callbacks") == [{"webhook_url": "https://secret.example", "secret": "lark_secret"}]
    assert told(swanlab, "init") == [{"project": "llamafactory", "workspace": "us", "mode": "online"}]
    assert [line["loss"] for line in told(swanlab, "log") if "loss" in line] == run.column("loss")
    assert run.trainer.args.report_to == ["swanlab"], "it is there once"
    assert json.loads((run.folder / "swanlab_public_config.json").read_text()) == {
        "cloud": {"experiment_url": "https://swanlab.example/run"}
    }
    assert json.loads((run.folder / "trackers.json").read_text()) == {"swanlab": "swan1"}
    written = "".join(path.read_text() for path in run.folder.iterdir() if path.suffix in (".yaml", ".json", ".jsonl", ".md"))
    assert "secret" not in (run.said + written).replace("swanlab_lark_secret: given", "")


def test_swanlab_kept_here(bench: Bench, swanlab: Any) -> None:
    run = bench.train(use_swanlab=True, swanlab_mode="local", swanlab_logdir="logs", swanlab_run_name="one", swanlab_project="p", **SECRETS)
    assert told(swanlab, "login") == [] and not (run.folder / "swanlab_public_config.json").exists()
    assert told(swanlab, "init") == [{"project": "p", "experiment_name": "one", "log_dir": "logs", "mode": "local"}]
    assert "pip install 'swanlab[dashboard]'" in run.said


def test_swanlab_that_refuses_the_key_ends_no_run(bench: Bench, swanlab: Any) -> None:
    run = bench.train(use_swanlab=True, swanlab_api_key="wrong_key")
    assert "the tracker swanlab is left out from here on: ConnectionError: … is not known" in run.said
    assert not run.complaint and len(told(swanlab, "login")) == 1


def test_report_to_swanlab_uses_the_packages_own_callback(bench: Bench, swanlab: Any) -> None:
    run = bench.train(report_to="swanlab", run_name="two")
    assert told(swanlab, "init") == [{"experiment_name": "two"}] and "the tracker" not in run.said


def test_what_swanlab_needs(keys: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finery.training.callbacks.swanlab.have", lambda _: False)
    with pytest.raises(UserError) as caught:
        Run.from_dict(keys(use_swanlab=True, swanlab_lark_secret="x"), trains=True)
    assert [line.removeprefix("Python: ") for line in caught.value.complaints] == [
        "'use_swanlab' needs a package that is not installed: pip install \"finery[track]\"",
        "'swanlab_lark_secret' needs 'swanlab_lark_webhook_url', whose messages it signs",
    ]
