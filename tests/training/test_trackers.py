"""Trackers: one that fails or hangs is told of once and left out; a resumed run goes on with the same; no secret is sent."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from finery.training import trackers
from finery.training.output import is_secret
from finery.training.trackers import Guarded, guard_trackers, hide_secrets
from watched import Bench

SAVES = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
HOOKS = ["on_init_end", "on_train_begin", "on_log", "on_save", "on_evaluate", "on_train_end"]
EVERY = SAVES | {"val_size": 4, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


@pytest.fixture
def threads() -> Iterator[Callable[[], set[str]]]:
    yield lambda: {thread.name for thread in threading.enumerate() if thread.name.startswith("tracker ")}


def failing(at: str) -> type:
    """A tracker that fails in one place, and counts what it is asked."""

    class Failing(TrainerCallback):
        asked: list[str] = []

        def __init__(self) -> None:
            self._work("__init__")

        def _work(self, hook: str) -> None:
            self.asked.append(hook)
            if hook == at:
                raise ConnectionError(f"no way\n out of {hook} to https://me:pass@board.example with $TRACKER_API_KEY")

    for name in HOOKS:
        setattr(Failing, name, lambda self, args, state, control, name=name, **_: self._work(name))
    return Failing


@pytest.mark.parametrize("at", ["__init__", *HOOKS])
def test_a_tracker_that_fails_is_told_once_and_left_out(at: str, bench: Bench) -> None:
    kind: Any = failing(at)
    bench.patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "comet_ml", kind)
    run = bench.train(**EVERY, report_to="comet_ml")
    assert not run.complaint and (run.folder / "adapter_model.safetensors").exists()
    told = [line for line in run.said.splitlines() if "the tracker " in line]
    assert told == [
        "warning: the tracker comet_ml is left out from here on: ConnectionError: "
        f"no way out of {at} to https://…@board.example with $TRACKER_API_KEY"
    ]
    assert kind.asked.count(at) == 1 and kind.asked[-1] == at


def test_the_others_go_on(bench: Bench) -> None:
    good: Any = failing("never")
    bench.patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "comet_ml", failing("on_log"))
    bench.patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "clearml", good)
    run = bench.train(report_to="comet_ml, clearml")
    assert good.asked.count("on_log") == len(run.log) and run.said.count("the tracker ") == 1
    assert run.trainer.args.report_to == ["clearml", "comet_ml"]


def test_a_tracker_that_hangs_is_waited_for_and_then_left_alone(bench: Bench, threads: Callable[[], set[str]]) -> None:
    free = threading.Event()

    class Hangs(TrainerCallback):
        def __init__(self) -> None:  # only now: on a busy machine, it might not even come up in so short a time
            bench.patch.setattr(trackers, "SECONDS", 0.2)

        def on_log(self, *_: Any, **__: Any) -> None:
            free.wait(600)

    bench.patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "comet_ml", Hangs)
    run = bench.train(report_to="comet_ml")
    assert "the tracker comet_ml is left out from here on: TimeoutError: no answer in 0.2 seconds" in run.said
    assert not run.complaint and "tracker comet_ml" in threads()
    free.set()
    end = time.monotonic() + 60
    while "tracker comet_ml" in threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert "tracker comet_ml" not in threads()


def test_a_thread_ends_with_its_tracker(threads: Callable[[], set[str]]) -> None:
    guarded = Guarded("idle", TrainerCallback)
    assert "tracker idle" in threads()
    del guarded
    end = time.monotonic() + 60
    while "tracker idle" in threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert "tracker idle" not in threads()


def test_one_thread_serves_all_hooks_of_a_tracker() -> None:
    """mlflow keeps its run by thread."""
    seen: list[threading.Thread] = []

    class Looks(TrainerCallback):
        def __init__(self) -> None:
            seen.append(threading.current_thread())

        def on_log(self, *_: Any, **__: Any) -> None:
            seen.append(threading.current_thread())

    guarded = Guarded("looks", Looks)
    guarded.on_log(None, None, None)
    guarded.on_step_end(None, None, None)  # which it does not listen to
    assert len(seen) == 2 and len(set(seen)) == 1 and seen[0] is not threading.current_thread()
    with pytest.raises(AttributeError):
        guarded.other  # noqa: B018


def test_trackers_are_kept_calm_and_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_LOGIN_TIMEOUT", "7")
    monkeypatch.delenv("SWANLAB_INTERACTIVE", raising=False)
    seen: dict[str, str] = {}
    Guarded("looks", lambda: seen.update(os.environ))
    assert (seen["WANDB_LOGIN_TIMEOUT"], seen["SWANLAB_INTERACTIVE"]) == ("7", "false")
    assert "SWANLAB_INTERACTIVE" not in os.environ


def test_secrets_are_not_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abc123def")

    def build() -> None:
        raise ValueError("neither abc123def nor hook-address is known")

    Guarded("board", build, secrets=["hook-address"])
    assert "ValueError: neither … nor … is known" in capsys.readouterr().err


def test_secrets_of_the_command_line_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "finery",
        "train",
        "run.yaml",
        "swanlab_api_key=abc",
        "--hf-hub-token",
        "def",
        "--ms_hub_token=ghi",
        "skip_special_tokens=true",
    ]
    hide_secrets(words)
    hidden = [word for word in words if "(hidden)" in word]
    assert hidden == ["swanlab_api_key=(hidden)", "(hidden)", "--ms_hub_token=(hidden)"] and words[-1] == "skip_special_tokens=true"
    monkeypatch.setattr(sys, "argv", words)
    seen: dict[str, str] = {}
    Guarded("looks", lambda: seen.update(os.environ))
    assert seen["SWANLAB_PROBE_RUNTIME"] == "false"


def test_the_arguments_that_trackers_send_hold_no_token(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), hub_token="hf_very_secret", use_cpu=True)
    assert "hf_very_secret" not in json.dumps([args.to_sanitized_dict(), args.to_json_string()], default=str)


def test_nothing_secret_reaches_a_tracker(bench: Bench) -> None:
    sent: list[str] = []

    class Sends(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            sent.append(args.to_json_string() + str(args.to_sanitized_dict()) + model.config.to_json_string() + str(vars(args)))

    bench.patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "comet_ml", Sends)
    secrets = {"swanlab_api_key": "very_secret_key", "swanlab_lark_webhook_url": "https://secret.example"}
    bench.train(report_to="comet_ml", hf_hub_token="hf_very_secret", **secrets)
    assert len(sent) == 1 and not any(word in sent[0] for word in ("hf_very_secret", "very_secret_key", "secret.example"))


def test_what_is_secret() -> None:
    assert all(is_secret(key) for key in ("swanlab_api_key", "swanlab_lark_secret", "swanlab_lark_webhook_url", "hf_hub_token"))
    assert not any(is_secret(key) for key in ("swanlab_project", "skip_special_tokens", "report_to"))


def test_all_asks_for_those_that_are_there(bench: Bench) -> None:
    bench.patch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["comet_ml"])
    bench.patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "comet_ml", failing("never"))
    assert bench.train(report_to="all").trainer.args.report_to == ["comet_ml"]
    assert bench.train(report_to="none").trainer.args.report_to == []


def test_other_processes_than_the_first_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    own = [TrainerCallback()]
    trainer: Any = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=own), args=SimpleNamespace())
    trainer.remove_callback = lambda _: None
    guard_trackers(trainer, ["comet_ml"])
    assert trainer.callback_handler.callbacks == own


# ------------------------------------------------------------------ going on with the same run


def cut(done: Path, to: Path) -> str:
    """A run's folder as if it had been cut off after its first checkpoint."""
    shutil.copytree(done, to)
    shutil.rmtree(to / "checkpoint-4")
    (to / "manifest.json").unlink()
    return str(to)


WANDB = """
import os
class Thing(dict):
    id = ""
    def update(self, other, **_): dict.update(self, other)
    def _label(self, **_): pass
run, config = None, Thing()
begun = []
def init(**how):
    global run
    run = Thing()
    run.summary = {}
    run.id = os.environ.get("WANDB_RUN_ID") or f"run{len(begun)}"
    begun.append((run.id, os.environ.get("WANDB_RESUME")))
def define_metric(*_, **__): pass
def log(values): pass
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package that has what transformers' callback uses."""
    for name, text in (("wandb/__init__.py", WANDB), ("wandb/sdk/lib/config_util.py", "class ConfigError(Exception): pass")):
        (tmp_path / "packages" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "packages" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    yield __import__("wandb")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def test_a_resumed_run_has_the_same_id(bench: Bench, wandb: Any) -> None:
    whole = bench.train(**SAVES, report_to="wandb")
    assert "the tracker" not in whole.said and json.loads((whole.folder / "trackers.json").read_text()) == {"wandb": "run0"}
    cuts = [cut(whole.folder, bench.tmp_path / f"cut{number}") for number in range(2)]
    wandb.run = None  # as in another process
    bench.train(**SAVES, report_to="wandb", output_dir=cuts[0])
    bench.patch.setenv("WANDB_RUN_ID", "mine")
    wandb.run = None
    bench.train(**SAVES, report_to="wandb", output_dir=cuts[1])
    bench.patch.delenv("WANDB_RUN_ID")
    wandb.run = None
    bench.train(**SAVES, report_to="wandb", output_dir=str(whole.folder), overwrite_output_dir=True)
    assert wandb.begun == [("run0", None), ("run0", "allow"), ("mine", None), ("run3", None)]
    assert "WANDB_RUN_ID" not in os.environ


def test_a_tracker_that_knows_runs_by_name_gets_one(tmp_path: Path) -> None:
    seen: list[str] = []

    class Trackio(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(args.run_name)

        on_log = on_train_begin

    def run(folder: Path, step: int, name: str | None = None) -> None:
        guarded = Guarded("trackio", Trackio)
        args = SimpleNamespace(output_dir=str(folder), run_name=name)
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        guarded.on_train_begin(args, state, None)
        guarded.on_log(args, state, None)
        assert args.run_name == name

    folder = tmp_path / "named"
    folder.mkdir()
    run(folder, 0)
    run(folder, 2)
    run(folder, 0)
    run(folder, 2, "mine")
    assert seen[0] == seen[1] == seen[2] == seen[3] != seen[4] and seen[0].startswith("named") and seen[6:] == ["mine", "mine"]


def test_a_torn_list_of_runs_is_as_none(tmp_path: Path) -> None:
    for text in ("{", "[]", ""):
        (tmp_path / "trackers.json").write_text(text)
        assert trackers._read(tmp_path) == {}


def test_tensorboard_goes_on_in_the_same_folder(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    whole = bench.train(**SAVES, logging_steps=1, report_to="tensorboard")
    assert "the tracker" not in whole.said
    folder = cut(whole.folder, bench.tmp_path / "cut")
    rest = bench.train(**SAVES, logging_steps=1, report_to="tensorboard", output_dir=folder)
    assert "the tracker" not in rest.said and "going on with" in rest.said
    (board,) = (rest.folder / "runs").iterdir()
    assert len(list(board.glob("events.*"))) >= 2
    found = EventAccumulator(str(board))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4], "steps beyond the checkpoint are there twice"
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(whole.column("loss"), rel=1e-5)
