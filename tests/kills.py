"""Kills runs at random moments, lets the same command go on, and compares what comes out with a run that nobody disturbed.

`python tests/kills.py --kills 200` prints a JSON report. Runs are forked off this process, which has imported everything: a start costs
a fraction of a second. Where a run is, it tells in a page of shared memory, which survives it; the kill itself is a plain SIGKILL.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

PHASES = ("before the first step", "preprocessing", "inside a step", "after a step", "inside an evaluation", "inside a save",
          "at an epoch edge", "the final save", "after training")  # fmt: skip
DEMANDED = PHASES[:3] + PHASES[4:7]
"""Those of which each must have seen kills."""
SECONDS = 120.0
"""No run takes so long."""

CASES: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora", "lora_dropout": 0.1},
    "full": {"finetuning_type": "full"},
    "lora, packed": {"finetuning_type": "lora", "packing": True, "neftune_noise_alpha": 5},
    "full, packed": {"finetuning_type": "full", "packing": True, "save_strategy": "epoch", "eval_strategy": "epoch"},
    "lora, accumulation": {
        "finetuning_type": "lora",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "lora_dropout": 0.1,
    },
    "full, streaming": {"finetuning_type": "full", "dataset": "stream", "streaming": True, "max_steps": 16, "buffer_size": 8},
    "lora, best": {"finetuning_type": "lora", "load_best_model_at_end": True, "save_total_limit": 1, "save_steps": 3},
}


class Page:
    """A page of memory that a run and its killer share: the phase, and how often phases have changed."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def set(self, phase: str) -> None:
        _, count = struct.unpack_from("ii", self.memory)
        struct.pack_into("ii", self.memory, 0, PHASES.index(phase), count + 1)

    def get(self) -> tuple[str, int]:
        phase, count = struct.unpack_from("ii", self.memory)
        return PHASES[phase], count


def mark(page: Page, owner: Any, name: str, phase: str, then: str = "") -> None:
    """Have a function tell that it is at work, and then what was before it, or what comes `then`."""
    work: Callable[..., Any] = getattr(owner, name)

    @wraps(work)
    def told(*args: Any, **kwargs: Any) -> Any:
        before = then or page.get()[0]
        page.set(phase)
        found = work(*args, **kwargs)
        page.set(before)
        return found

    setattr(owner, name, told)


def mark_phases(page: Page) -> None:
    """Patch the trainer of this process."""
    from finery.data import load
    from finery.training import kept, trainer

    mark(page, load, "load_sets", "preprocessing")
    mark(page, trainer.Trainer, "training_step", "inside a step", "inside a step")  # until the optimizer has stepped
    mark(page, kept._Marks, "on_step_end", "after a step", "after a step")
    mark(page, trainer.Trainer, "evaluation_loop", "inside an evaluation")
    mark(page, kept.KeptTrainer, "_save_checkpoint", "inside a save")
    mark(page, kept._Marks, "on_epoch_end", "at an epoch edge", "at an epoch edge")
    mark(page, kept.KeptTrainer, "save_trained", "the final save", "after training")


@dataclass
class Kill:
    """How a run is killed: when a phase is reached for the n-th time, and so long after that."""

    phase: str
    nth: int
    seconds: float


@dataclass
class Case:
    """One configuration: how it ended undisturbed, and where it was killed."""

    name: str
    keys: dict[str, Any]
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    faults: list[str] = field(default_factory=list)


def start(keys: dict[str, Any], page: Page, log: Path) -> int:
    """Fork a process that trains; returns its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(place, 1)
        os.dup2(place, 2)
        mark_phases(page)
        page.set("before the first step")
        from finery.cli import main

        status = main(["train", *(f"{key}={json.dumps(value)}" for key, value in keys.items())])
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def watch(child: int, page: Page, kill: Kill | None) -> tuple[int | None, str]:
    """Wait until a run has ended (its exit code), or kill it as planned (nothing, and the phase it was in)."""
    seen, last, deadline = 0, -1, time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), page.get()[0]
        phase, count = page.get()
        if kill is not None and count != last and phase == kill.phase:
            seen += 1
            if seen >= kill.nth:
                time.sleep(kill.seconds)
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                gone = os.waitstatus_to_exitcode(status)
                return (None if gone == -signal.SIGKILL else gone), page.get()[0]
        last = count
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124, page.get()[0]


def left_over(session: int) -> list[int]:
    """Processes of a session that are still there some seconds after its leader was killed."""
    deadline = time.monotonic() + 10
    found: list[int] = []
    while time.monotonic() < deadline:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
                if int(own) == session and state != "Z":
                    found.append(int(path.parent.name))
        if not found:
            return []
        time.sleep(0.05)
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on kills: weights to the byte, every figure of the log, the stream of tokens."""
    manifest = json.loads((folder / "manifest.json").read_text())
    timed = ("elapsed_time", "remaining_time", "tokens_per_second", "supervised_tokens_per_second", "mfu")
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    told = [{key: value for key, value in line.items() if key not in timed and not key.endswith("_share")} for line in lines]
    return {"weights": manifest["results"]["weights"], "stream": manifest["stream"], "losses": manifest["results"]["losses"], "log": told}


def campaign(names: list[str], num_kills: int, seed: int, room: Path, base: dict[str, Any]) -> dict[str, Any]:
    """Run every case undisturbed, then again and again with kills, until there are enough and no phase has too few."""
    dice = random.Random(seed)
    page, cases = Page(), {name: Case(name, base | CASES[name]) for name in names}
    wanted = {}
    for case in cases.values():
        keys = case.keys | {"output_dir": str(room / f"{case.name} whole")}
        status, _ = watch(start(keys, page, room / "log"), page, None)
        assert status == 0, (room / "log").read_text()[-3000:]
        wanted[case.name] = outcome(Path(keys["output_dir"]))
    fewest = 1 if num_kills < 50 else 5
    while True:
        counts = sum((case.kills for case in cases.values()), Counter())
        needed = [phase for phase in DEMANDED if counts[phase] < fewest]
        if counts.total() >= num_kills and not needed:
            break
        if sum(case.runs for case in cases.values()) > 4 * num_kills + 20:
            break
        case = min(cases.values(), key=lambda one: (one.kills.total(), dice.random()))
        disturb(case, needed, page, dice, room, wanted[case.name])
    faults = {case.name: case.faults for case in cases.values() if case.faults}
    return {
        "kills": counts.total(),
        "by_phase": {phase: counts[phase] for phase in PHASES if counts[phase]},
        "by_case": {case.name: case.kills.total() for case in cases.values()},
        "runs_compared": sum(case.runs for case in cases.values()),
        "faults": faults,
    }


def disturb(case: Case, needed: list[str], page: Page, dice: random.Random, room: Path, wanted: dict[str, Any]) -> None:
    """One run of a case, killed a few times on its way, then let to its end and compared."""
    case.runs += 1
    folder = room / f"{case.name} {case.runs}"
    keys = case.keys | {"output_dir": str(folder)}
    for _ in range(dice.randint(2, 5)):
        phase = dice.choice(needed) if needed and dice.random() < 0.7 else dice.choice(PHASES)
        kill = Kill(phase, dice.choice([1, 1, 2, 3, 5]), dice.choice([0.0, dice.random() * 0.002, dice.random() * 0.03]))
        child = start(keys, page, room / "log")
        status, where = watch(child, page, kill)
        if status is None:
            case.kills[where] += 1
            if orphans := left_over(child):
                case.faults.append(f"processes {orphans} outlived a run that was killed {where}")
        elif status == 0:
            break
        else:
            case.faults.append(f"exit code {status} after {dict(case.kills)}: {(room / 'log').read_text()[-2000:]}")
            return
    else:
        status, _ = watch(start(keys, page, room / "log"), page, None)
        if status:
            case.faults.append(f"exit code {status} at the end: {(room / 'log').read_text()[-2000:]}")
            return
    found = outcome(folder)
    case.faults += [f"run {case.runs}: {part} differ from the undisturbed run's" for part in wanted if found[part] != wanted[part]]
    rest = [path.name for path in folder.iterdir() if path.name.endswith((".part", ".going", ".replaced"))]
    case.faults += [f"run {case.runs}: {rest} were left"] if rest else []


def prepare(room: Path) -> dict[str, Any]:
    """A tiny model, data of which a part is streamed as if from a hub, and the keys that all cases share."""
    import datasets
    import torch

    from conftest import RECORDS, build_model
    from finery.data.streams import StreamTable

    torch.set_num_threads(1)
    os.environ["FINERY_CACHE"] = str(room / "cache")
    build_model(room / "model")
    (room / "sums.json").write_text(json.dumps(RECORDS))
    (room / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "sums.json"}, "stream": {"hf_hub_url": "org/x"}}))

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        return datasets.IterableDataset.from_generator(
            lambda parts: (row for part in parts for row in part), gen_kwargs={"parts": [RECORDS[:12], RECORDS[12:]]}
        )

    datasets.load_dataset = load_dataset  # type: ignore[assignment]
    StreamTable.content = property(lambda self: f"{self.repository}@1 {self.settings}")  # type: ignore[assignment,method-assign]
    return {
        "model_name_or_path": str(room / "model"), "stage": "sft", "do_train": True, "dataset": "sums", "dataset_dir": str(room),
        "eval_dataset": "sums", "cutoff_len": 160, "num_train_epochs": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2, "logging_steps": 5, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "bf16": False,
        "save_total_limit": 3, "report_to": "none", "save_verify": False, "use_cpu": True,
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        import finery.commands.train
        import finery.training.session
        import finery.training.trainer  # noqa: F401 -- before the first fork

        found = campaign(args.cases, args.kills, args.seed, Path(folder), prepare(Path(folder)))
    print(json.dumps(found | {"seconds": round(time.time() - began)}, indent=1))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
