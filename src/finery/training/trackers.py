"""Trackers that `report_to` names: each in a thread of its own with a time limit, so that none can end a run or hold it up.

A resumed run goes on with the tracker's same run, where the tracker knows of such: trackers.json in the output folder holds what that
one is called there. A variable of the environment that names another (WANDB_RUN_ID, say) is obeyed.
"""

import json
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from finery.compat import is_first
from finery.files import replace_text
from finery.log import get_logger
from finery.training.callbacks.base import Callback
from finery.training.output import is_secret

if TYPE_CHECKING:
    from transformers import Trainer

log = get_logger(__name__)

FILE = "trackers.json"
SECONDS = 120.0
"""How long a tracker may take for one thing."""
SECONDS_TO_SEND = 600.0
"""The same where it may be sending a model."""
SENDS = ("on_save", "on_train_end", "on_push_begin")

CALM = {
    "SWANLAB_INTERACTIVE": "false",  # nobody is asked for a key in the middle of a run
    "WANDB_LOGIN_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "300",  # at the end of the process
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""How trackers are kept from waiting for ever, where the user has not said otherwise."""
HIDDEN = "(hidden)"


@dataclass(frozen=True)
class ByVariable:
    """How a tracker is told to go on with a run of its own: by a variable of the environment."""

    variable: str
    read: Callable[[Any], str]  # what its current run is called, from its package
    beside: Mapping[str, str] = field(default_factory=dict)


BY_VARIABLE = {
    "wandb": ByVariable("WANDB_RUN_ID", lambda wandb: wandb.run.id, {"WANDB_RESUME": "allow"}),
    "mlflow": ByVariable("MLFLOW_RUN_ID", lambda mlflow: mlflow.active_run().info.run_id),
    "swanlab": ByVariable("SWANLAB_RUN_ID", lambda swanlab: swanlab.get_run().id, {"SWANLAB_RESUME": "allow"}),
}


class Place:
    """Which run of a tracker's this one is written to."""

    def __init__(self, tracker: str) -> None:
        self.tracker = tracker
        self.variables: dict[str, str] = {}
        self.run_name: str | None = None

    def begin(self, callback: Any, args: Any, state: Any) -> None:
        """Before the tracker sets itself up: in a resumed run, have it take what it had."""
        folder = Path(str(args.output_dir))
        known = _read(folder).get(self.tracker) if state.global_step else None
        way = BY_VARIABLE.get(self.tracker)
        if self.tracker == "tensorboard":
            if known and callback.logging_dir is None:
                callback.logging_dir = str(folder / known)
            if state.global_step and callback.logging_dir:  # what lies beyond the checkpoint is no part of this run
                callback.tb_writer = callback._SummaryWriter(log_dir=callback.logging_dir, purge_step=state.global_step + 1)
        elif self.tracker == "trackio":  # knows runs by name, and makes up another each time, even for what follows the last step
            self.run_name = args.run_name or known or f"{folder.name}-{os.urandom(3).hex()}"
        elif way and known and way.variable not in os.environ:
            self.variables = {way.variable: known, **way.beside}

    def keep(self, callback: Any, args: Any) -> None:
        """Write down where it was begun."""
        folder = Path(str(args.output_dir))
        name = self.run_name
        if self.tracker == "tensorboard":
            name = os.path.relpath(callback.logging_dir, folder)
        elif self.tracker in BY_VARIABLE:
            name = BY_VARIABLE[self.tracker].read(sys.modules[self.tracker])
            self.variables = {BY_VARIABLE[self.tracker].variable: name, **BY_VARIABLE[self.tracker].beside}
        if name:
            replace_text(folder / FILE, json.dumps(_read(folder) | {self.tracker: name}, indent=1) + "\n")

    def named(self, args: Any) -> Any:
        """The trainer's arguments, as this tracker should see them."""
        if self.run_name is None:
            return args
        changed = copy(args)
        changed.run_name = self.run_name
        return changed


def _read(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Guarded:
    """Passes the hooks of a callback on to it. The first time that it fails or takes too long is told, and was the last.

    `build` makes the callback; it may fail as well. What is told holds none of `secrets`.
    """

    def __init__(self, tracker: str, build: Callable[[], Any], secrets: Iterable[str] = ()) -> None:
        self.tracker = tracker
        self.callback: Any = None
        self.is_lost = False
        self._secrets = list(secrets)
        self._place = Place(tracker)
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        # one thread for all hooks, since some trackers keep their run by thread; a daemon, since one that hangs would keep the process
        Thread(target=_serve, args=(self._jobs,), name=f"tracker {tracker}", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)
        self._attempt(lambda: setattr(self, "callback", build()), SECONDS)

    def __getattr__(self, hook: str) -> Callable[..., None]:
        """The hooks, as transformers calls them."""
        if not hook.startswith("on_"):
            raise AttributeError(hook)

        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.is_lost and hook in _hooks_of(type(self.callback)):
                seconds = SECONDS_TO_SEND if hook in SENDS else SECONDS
                self._attempt(lambda: self._call(hook, args, state, control, kwargs), seconds)

        return call

    def leave(self) -> None:
        """The run is over, or paused. trackio would still be sending: at the end of a process it finishes the main thread's run alone."""
        if self.tracker == "trackio" and not self.is_lost and getattr(self.callback, "_initialized", False):
            self._attempt(self._finish_trackio, SECONDS_TO_SEND)

    def _finish_trackio(self) -> None:
        self.callback._trackio.finish()
        self.callback._initialized = False

    def _call(self, hook: str, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any]) -> None:
        begins = hook == "on_train_begin" and state.is_world_process_zero
        if begins:
            self._place.begin(self.callback, args, state)
        with _environment(self._place.variables):
            getattr(self.callback, hook)(self._place.named(args), state, control, **kwargs)
        if begins:
            self._place.keep(self.callback, args)

    def _attempt(self, work: Callable[[], None], seconds: float) -> None:
        answer: SimpleQueue[BaseException | None] = SimpleQueue()

        def calmly() -> None:
            hidden = any(HIDDEN in word for word in sys.argv)
            with _environment(CALM | ({"SWANLAB_PROBE_RUNTIME": "false"} if hidden else {})):  # it asks the system for the command line
                work()

        self._jobs.put((calmly, answer))
        try:
            error = answer.get(timeout=seconds)
        except Empty:
            error = TimeoutError(f"no answer in {seconds:g} seconds")
        if error is not None:
            self.is_lost = True
            self._jobs.put(None)
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.warning("the tracker %s is left out from here on: %s", self.tracker, _without(self._secrets, why)[:400])


def _serve(jobs: "SimpleQueue[Any]") -> None:
    """The thread of a tracker."""
    while (job := jobs.get()) is not None:
        work, answer = job
        try:
            work()
        except BaseException as error:  # some leave by SystemExit
            answer.put(error)
        else:
            answer.put(None)
        del job, work, answer  # they hold what the thread would keep alive while it waits


@cache
def _hooks_of(kind: type) -> frozenset[str]:
    """What a callback listens to: most hooks of most are those of the class that does nothing."""
    from transformers import TrainerCallback

    hooks = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    return frozenset(name for name in hooks if getattr(kind, name, None) not in (None, getattr(TrainerCallback, name)))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that hold for a while, but for those that are set already."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _without(secrets: Iterable[str], text: str) -> str:
    """A library's message may quote the key that it was given, or an address with a password in it."""
    named = (value for name, value in os.environ.items() if name.endswith(("KEY", "TOKEN", "SECRET", "PASSWORD")) and len(value) > 5)
    for secret in [*secrets, *named]:
        text = text.replace(secret, "…")
    return re.sub(r"://[^/@\s]+@", "://…@", text)


def hide_secrets(words: list[str]) -> None:
    """Trackers send the command line as well: what stands there of keys that hold secrets is written over."""
    for place, word in enumerate(words):
        key, equals, _ = word.partition("=")
        if is_secret(key.lstrip("-").replace("-", "_")):
            if equals:
                words[place] = f"{key}={HIDDEN}"
            elif key.startswith("--") and place + 1 < len(words):
                words[place + 1] = HIDDEN


def guard_trackers(trainer: "Trainer", asked: str | list[str] | None) -> None:
    """Give the trainer the trackers that `report_to` asks for, guarded, and guard those that it has already.

    transformers' printer of figures goes: our own bar and lines serve.
    """
    from transformers import PrinterCallback
    from transformers.integrations import integration_utils as integrations

    hide_secrets(sys.argv)
    trainer.remove_callback(PrinterCallback)
    kinds: dict[type, str] = {kind: name for name, kind in integrations.INTEGRATION_TO_CALLBACK.items()}
    found: list[Any] = []
    for callback in trainer.callback_handler.callbacks:
        own = callback if isinstance(callback, Callback) else None
        tracker = own.tracker if own else kinds.get(type(callback), "")
        found.append(Guarded(tracker, lambda callback=callback: callback, own.secrets if own else ()) if tracker else callback)
    taken = {guarded.tracker for guarded in found if isinstance(guarded, Guarded)}
    words = [asked] if isinstance(asked, str) else asked or []
    wanted = integrations.get_available_reporting_integrations() if "all" in words else words
    for name in wanted if is_first() else ():  # in other processes they would do nothing
        if name not in taken and name != "none":
            guarded = Guarded(name, lambda name=name: _build(name, trainer.args))
            guarded.on_init_end(trainer.args, trainer.state, trainer.control)
            found.insert(1, guarded)  # behind transformers' own, before the progress bar: one may ask for a key while it sets itself up
    trainer.callback_handler.callbacks = found
    trainer.args.report_to = [guarded.tracker for guarded in found if isinstance(guarded, Guarded)]


def leave_trackers(trainer: "Trainer") -> None:
    """Let trackers send what they hold: a run has ended, in whatever way."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Guarded):
            callback.leave()


def _build(name: str, args: Any) -> Any:
    if name == "swanlab":  # transformers' own (5.23) does not go with swanlab from 0.8 on
        from swanlab.integration.transformers import SwanLabCallback  # type: ignore[import-not-found]

        return SwanLabCallback(experiment_name=args.run_name)
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return INTEGRATION_TO_CALLBACK[name]()
