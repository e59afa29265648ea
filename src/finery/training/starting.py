"""Where a run starts: anew, or with a checkpoint of the very same run; and what is cleared away for a new one."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from finery.errors import UserError
from finery.files import read_yaml
from finery.log import get_logger
from finery.training.arguments import trainer_fields
from finery.training.checkpoints import Checkpoint, listed, newest, read
from finery.training.choices import Choices

log = get_logger(__name__)

FILE = "run.json"
"""In every checkpoint: what a run must share with it to go on."""
WRITTEN = (
    "checkpoint-[0-9]*",
    ".checkpoint-[0-9]*",
    "trainer_log.jsonl",
    "trainer_state.json",
    "manifest.json",
    "trackers.json",
    "swanlab_public_config.json",
    "loss_ledger",
    "nonfinite",
    "*_results.json",
    "generated_predictions*.jsonl",
    "training_*.png",
    "adapter_*",
    "model*.safetensors*",
)
"""What a run writes that another run in the same folder would not write over."""
MOST_TOLD = 8


@dataclass(frozen=True)
class Facts:
    """What makes two runs the same: keys that were asked for, processes, and digests of everything that is read."""

    keys: Mapping[str, Any]
    num_ranks: int = 1
    inputs: dict[str, str] = field(default_factory=dict)  # filled when they are read
    history: list[str] = field(default_factory=list)  # where it was gone on with as another run, and what differed
    decided: dict[str, Any] = field(default_factory=dict)  # values that the run has settled; to ask for them is to ask for the same

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")

    def differing(self, start: Path) -> tuple[list[str], list[str]]:
        """What differs from the run that wrote a checkpoint: what must not, and what may where that is asked for."""
        try:
            told = json.loads((start / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return [f"{start} does not tell what it was trained with"], []
        decided = told["decided"] | {key: choice.value for key, choice in Choices({}, start).remembered.items()}
        fatal, said = [], []
        for key, was, now in _pairs(told["keys"], json.loads(json.dumps(dict(self.keys), default=str))):
            if key not in may_differ("freely") and was != now and not (key in decided and now == decided[key]):
                (said if key in may_differ("told") else fatal).append(f"{key!r} was {_short(was)}, is {_short(now)}")
        if told["num_ranks"] != self.num_ranks:
            fatal.append(f"there were {told['num_ranks']} processes, there are {self.num_ranks}")
        return sorted(fatal), sorted(said)

    def changed_inputs(self, start: Path) -> list[str]:
        """Names of what is read and is no longer what it was."""
        told = json.loads((start / FILE).read_text(encoding="utf-8"))["inputs"]
        return list(changed(told, self.inputs))


STEP = "per_device_train_batch_size x gradient_accumulation_steps"


def normal(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, in one form: what comes to the same is the same."""
    found = dict(keys)
    found[STEP] = found.pop("per_device_train_batch_size", 1) * found.pop("gradient_accumulation_steps", 1)
    found["warmup_ratio"] = found.get("warmup_ratio") or 0.0
    found["optim_args"] = found.get("optim_args") or None
    if found.get("data_seed") == found.get("seed"):
        found["data_seed"] = None  # it is the seed where it is not given
    if isinstance(found.get("lora_target"), (list, tuple)):
        found["lora_target"] = sorted(found["lora_target"])
    if (found.get("max_steps") or -1) > 0:
        found.pop("num_train_epochs", None)  # which it overrides
    return found


def _pairs(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys with both values. One that is not there is the trainer's and has its default; others come and go with versions."""
    fields = trainer_fields()
    for key in was.keys() | now.keys():
        if (key in was and key in now) or key in fields:
            default = fields[key].default if key in fields else None
            yield key, was.get(key, default), now.get(key, default)


def changed(was: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Names of inputs whose digests differ, or that only one side has."""
    for name in was.keys() | now.keys():
        if was.get(name) != now.get(name):
            yield f"{name} ({'is new' if name not in was else 'is gone' if name not in now else 'has changed'})"


@cache
def may_differ(how: str) -> frozenset[str]:
    """Keys that may differ on resume: `freely`, or `told` where a resume is asked for."""
    found = read_yaml(Path(__file__).with_name("may_differ.yaml"))
    return frozenset(key for group in found[how] for key in group["keys"])


def starting_point(folder: Path, resume: str | bool | None, overwrite: bool, has_model: bool, facts: Facts) -> Checkpoint | None:
    """The checkpoint to go on with, or nothing for a fresh start.

    A folder with a run in it is gone on with where it is the same run, unless `overwrite`. Raises `UserError` where `resume` names no
    complete checkpoint, where the run differs, or where the folder holds what a run has left and nothing to go on with.
    """
    if isinstance(resume, str):
        return _named(folder, Path(resume), overwrite, has_model, facts)
    if overwrite and not resume:
        return None
    there = listed(folder)
    found = newest(folder)
    if resume and found is None:
        raise UserError(f"'resume_from_checkpoint: true': there is no complete checkpoint in {folder}")
    if resume is False and (found is not None or has_model):
        raise UserError(f"'output_dir': {folder} holds a run already; {ANEW}")
    if found is not None:
        _check_same(facts, found, asked=bool(resume))
        log.info("going on with %s; 'overwrite_output_dir: true' would start anew", found.folder)
    elif has_model:
        raise UserError(f"'output_dir': {folder} holds a trained model already; {ANEW}")
    elif there:
        why = "they hold no optimizer's state ('save_only_model')" if not there[-1].resumable else "they are damaged"
        raise UserError(f"'output_dir': {folder} holds checkpoints that cannot be gone on with: {why}; {ANEW}")
    return found


ANEW = "set 'overwrite_output_dir: true' or name another folder"


def _named(folder: Path, path: Path, overwrite: bool, has_model: bool, facts: Facts) -> Checkpoint:
    """The checkpoint that a key names; from elsewhere, it is not gone on with over another run's results."""
    found = read(path)
    if found is None or not found.resumable:
        lacks = "it was interrupted, or written with 'save_only_model'" if path.is_dir() else "there is no such folder"
        raise UserError(f"'resume_from_checkpoint': {path} holds no complete checkpoint ({lacks})")
    if damage := found.damage():
        raise UserError(f"'resume_from_checkpoint': {path} is damaged: {damage}; an earlier checkpoint may be whole")
    _check_same(facts, found, asked=True)
    if not overwrite and not lies_in(found, folder) and (has_model or listed(folder)):
        on = "; 'resume_from_checkpoint: true' goes on with its own newest checkpoint" if newest(folder) is not None else ""
        raise UserError(f"'output_dir': {folder} holds a run already, and {path} is of another folder; {ANEW}{on}")
    return found


def lies_in(start: Checkpoint, folder: Path) -> bool:
    """Whether a checkpoint is one of the run in `folder`."""
    return start.folder.resolve().parent == folder.resolve()


def _check_same(facts: Facts, start: Checkpoint, asked: bool) -> None:
    """Raise `UserError` with all that differs; what may differ where a resume is `asked` for is said."""
    fatal, said = facts.differing(start.folder)
    if fatal or (said and not asked):
        listed = "; ".join([*fatal, *said][:MOST_TOLD]) + (" …" if len(fatal) + len(said) > MOST_TOLD else "")
        ways = ["'overwrite_output_dir: true' starts anew", "another 'output_dir' leaves it as it is"]
        if not fatal:
            ways = ["'resume_from_checkpoint: true' goes on in spite of that", *ways]
        raise UserError(f"{start.folder} is of another run: {listed}. {'; '.join(ways)}")
    facts.history.extend(json.loads((start.folder / FILE).read_text(encoding="utf-8"))["history"])
    if said:
        facts.history.append(f"from step {start.step + 1} on: {'; '.join(said)}")
        log.warning("going on with %s as another run: %s", start.folder, "; ".join(said))


def check_inputs(facts: Facts, start: Path) -> None:
    """Raise `UserError` where what is read is not what the run that is gone on with has read."""
    if found := facts.changed_inputs(start):
        advice = "'overwrite_output_dir: true' starts anew"
        raise UserError(f"{start} was trained on something else: {'; '.join(sorted(found)[:MOST_TOLD])}. {advice}")


def check_not_done(start: Checkpoint, num_steps: int, done: int | None) -> None:
    """Raise a `UserError` where no step is left to go on with, or the run has ended well; `done` tells for how many steps it was."""
    if start.step > num_steps or (done is not None and done >= num_steps):
        raise UserError(
            f"{start.folder} is the end of a run of {num_steps} steps: set 'overwrite_output_dir: true' to train anew, or train longer"
        )


def clear(folder: Path) -> None:
    """Remove what an earlier run has written, so that nothing of it is taken for this one's."""
    for path in sorted(path for pattern in WRITTEN for path in folder.glob(pattern)):
        log.info("removing %s, as 'overwrite_output_dir' asks", path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
