"""Kills runs at random moments, lets the same command go on, and compares what comes out with a run that nobody disturbed.

`python tests/kills.py --kills 210` prints a JSON report; `--result FILE` writes it down with the command, the date and versions. Runs are
forked off this process, which has imported everything: a start costs a fraction of a second. Where a run is, it tells in a page of
shared memory, which survives it; the kill itself is a plain SIGKILL. One case is processes of their own, killed at any moment.

That the end is the same to the byte would also be so if each start began anew. So after each kill the folder is looked at: the
newest complete checkpoint never falls, the next start begins with it, and no more steps are done again than lie between two saves.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from killed import OWN, PHASES, Page, began_with, encoded_rows, newest_step, start

os.environ.setdefault("OMP_NUM_THREADS", "1")

DEMANDED = PHASES[:3] + PHASES[4:7]
"""Those of which each must have seen kills."""
SAVE = "inside a save"
"""Where most can be lost."""
ONCE = (*PHASES[:2], *PHASES[7:9])
"""Those that a process sees once."""
LASTS = (0.8, 0.15, 0.012, 0.001, 0.015, 0.02, 0.001, 0.01, 0.05)
"""About so many seconds each of the phases: kills are to fall anywhere in them."""
SECONDS = 300.0
"""No run takes so long."""
LEFT_SECONDS = 10.0
"""After that, no process of a killed run is there any more."""
ROOT = Path(__file__).parents[1]

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
    "lora, all dice": {"finetuning_type": "lora", "lora_dropout": 0.1, "save_steps": 3},
    "full, worker": {"finetuning_type": "full", "dataloader_num_workers": 1},
    "lora, own process": {"finetuning_type": "lora", "lora_dropout": 0.1},
}
HOW = {"lora, all dice": "noisy", "lora, own process": "own"}
"""How runs of a case are started, where it is not plainly."""
SHARE = {"lora, own process": 3}
"""A kill of these takes the time of so many others."""


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
    how: str = ""
    wanted: dict[str, Any] = field(default_factory=dict)  # of the undisturbed run
    interval: int = 0  # steps from save to save
    rows: int = 0  # that are to be encoded
    seconds: float = 0.0  # that the undisturbed run took
    kills: Counter[str] = field(default_factory=Counter)
    again: list[int] = field(default_factory=list)  # steps that each kill has cost
    left: list[int] = field(default_factory=list)  # rows still to be encoded at each kill while preprocessing
    runs: int = 0
    faults: list[str] = field(default_factory=list)


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


def left_over(session: int, seconds: float = LEFT_SECONDS) -> list[int]:
    """Processes of a session that are still there some seconds after its leader was killed."""
    deadline = time.monotonic() + seconds
    while True:
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
                if int(own) == session and state != "Z":
                    found.append(int(path.parent.name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def outcome(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on kills: weights to the byte, every figure of the log, the stream of tokens."""
    manifest = json.loads((folder / "manifest.json").read_text())
    timed = ("elapsed_time", "remaining_time", "tokens_per_second", "supervised_tokens_per_second", "mfu")
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    told = [{key: value for key, value in line.items() if key not in timed and not key.endswith("_share")} for line in lines]
    return {"weights": manifest["results"]["weights"], "stream": manifest["stream"], "losses": manifest["results"]["losses"], "log": told}


class Course:
    """One disturbed run of a case: its processes, one after the other, and what was done and must not be lost."""

    def __init__(self, case: Case, page: Page, room: Path) -> None:
        case.runs += 1
        self.case, self.page, self.log = case, page, room / "log"
        self.folder, self.cache = room / f"{case.name} {case.runs}", room / f"cache of {case.name} {case.runs}"
        self.newest = self.encoded = 0
        self.killed: list[tuple[int, float]] = []  # each process, and when

    def go(self, kill: Kill | None) -> int | None:
        """Let a process work until it is killed or ends; returns its exit code, nothing where it was killed and has left work."""
        child = start(self.case.keys | {"output_dir": str(self.folder)}, self.page, self.log, self.cache, self.case.how)
        status, where = watch(child, self.page, kill)
        begun, done = self.page.steps()
        if self.case.how == "own":
            begun = began_with(self.log)
        newest, (encoded, _) = newest_step(self.folder), encoded_rows(self.cache)
        if begun >= 0 and begun != self.newest:
            self.fault(f"began with step {begun} where that of step {self.newest} was the newest complete checkpoint")
        if newest < self.newest:
            self.fault(f"killed {where}, its newest complete checkpoint is that of step {newest}, and was that of step {self.newest}")
        if encoded < self.encoded or self.page.rows() > self.case.rows - self.encoded:
            self.fault(f"{self.encoded} of {self.case.rows} rows were encoded; then {self.page.rows()} more, and there are {encoded}")
        if status is None:
            self.count(where, child, max(begun, done, newest) - newest, self.case.rows - encoded)
        elif status:
            self.fault(f"exit code {status} after {dict(self.case.kills)}: {self.log.read_text()[-2000:]}")
        self.newest, self.encoded = newest, encoded
        is_over = status is None and (self.folder / "manifest.json").exists()  # killed when all was done: it would be told so
        return 0 if is_over else status

    def count(self, where: str, child: int, again: int, left: int) -> None:
        """Note a kill: where it fell, and what it cost."""
        if where == "preprocessing" and left <= 0:
            where = PHASES[0]  # all was encoded before: it was looked up
        if where == "preprocessing":
            self.case.left.append(left)
        self.case.kills[where] += 1
        self.case.again.append(again)
        self.killed.append((child, time.monotonic()))
        if again > self.case.interval:
            self.fault(f"killed {where}, {again} steps are to be done again, and every {self.case.interval} are saved")

    def fault(self, text: str) -> None:
        """Note what must not be."""
        self.case.faults.append(f"run {self.case.runs}: {text}")

    def compare(self) -> None:
        """After its end: what came out, what is left in the folder, what still runs."""
        found = outcome(self.folder)
        for part in self.case.wanted:
            if found[part] != self.case.wanted[part]:
                self.fault(f"{part} differ from the undisturbed run's")
        rest = [path.name for path in self.folder.iterdir() if path.name.endswith((".part", ".going", ".replaced"))]
        if rest:
            self.fault(f"{rest} were left")
        for child, when in self.killed:
            if orphans := left_over(child, when + LEFT_SECONDS - time.monotonic()):
                self.fault(f"processes {orphans} outlived one that was killed")
                for orphan in orphans:
                    os.kill(orphan, signal.SIGKILL)


class Campaign:
    """Every case undisturbed, then again and again with kills, until there are enough and no phase has too few."""

    def __init__(self, names: list[str], num_kills: int, seed: int, room: Path, base: dict[str, Any]) -> None:
        self.num_kills, self.dice, self.room, self.page = num_kills, random.Random(seed), room, Page()
        self.fewest = 1 if num_kills < 50 else 5
        self.cases = [Case(name, base | CASES[name], HOW.get(name, "")) for name in names]

    def undisturbed(self, case: Case) -> None:
        """What a case comes to when nobody kills it."""
        folder, cache, began = self.room / f"{case.name} whole", self.room / f"cache of {case.name}", time.monotonic()
        child = start(case.keys | {"output_dir": str(folder)}, self.page, self.room / "log", cache, case.how)
        status, _ = watch(child, self.page, None)
        assert status == 0, (self.room / "log").read_text()[-3000:]
        case.wanted, case.rows, case.seconds = outcome(folder), encoded_rows(cache)[1], time.monotonic() - began
        steps = json.loads((folder / "manifest.json").read_text())["planned_steps"]
        case.interval = case.keys["save_steps"] if case.keys.get("save_strategy") != "epoch" else steps // case.keys["num_train_epochs"]

    def counts(self) -> Counter[str]:
        """Kills of each phase."""
        return sum((case.kills for case in self.cases), Counter())

    def needed(self) -> list[str]:
        """Phases that have seen too few kills."""
        counts = self.counts()
        return [phase for phase in DEMANDED if counts[phase] < self.fewest]

    def plan(self, course: Course) -> Kill:
        """The next kill of a run."""
        if course.case.how == "own":
            return Kill(OWN, 1, self.dice.random() * course.case.seconds)
        needed = self.needed()
        phase = self.dice.choice((*PHASES[:1], *PHASES[2:9], SAVE, SAVE))
        if course.encoded < course.case.rows and ("preprocessing" in needed or self.dice.random() < 0.3):
            phase = "preprocessing"
        elif (others := [one for one in needed if one != "preprocessing"]) and self.dice.random() < 0.8:
            phase = self.dice.choice(others)
        seldom = {"at an epoch edge": [1, 1, 2], SAVE: [1, 2, 2, 3]}  # in the first save, nothing can be lost yet
        nth = 1 if phase in ONCE else self.dice.choice(seldom.get(phase, [1, 1, 2, 3, 5]))
        return Kill(phase, nth, self.dice.choice([0.0, 1.0, 1.0]) * self.dice.random() * LASTS[PHASES.index(phase)])

    def disturb(self, case: Case) -> None:
        """One run of a case, killed a few times on its way, then let to its end and compared."""
        course, status = Course(case, self.page, self.room), None
        for _ in range(self.dice.randint(2, 5)):
            if (status := course.go(self.plan(course))) is not None:
                break
        else:
            status = course.go(None)
        if not status:
            course.compare()

    def run(self) -> dict[str, Any]:
        """All of it; returns the report."""
        for case in self.cases:
            self.undisturbed(case)
        while self.counts().total() < self.num_kills or self.needed():
            if sum(case.runs for case in self.cases) > 4 * self.num_kills + 20:
                break
            self.disturb(min(self.cases, key=lambda one: (one.kills.total() * SHARE.get(one.name, 1), self.dice.random())))
        return self.report()

    def report(self) -> dict[str, Any]:
        """What was counted."""
        counts, left = self.counts(), [rows for case in self.cases for rows in case.left]
        again = [steps for case in self.cases for steps in case.again]
        return {
            "kills": counts.total(),
            "by_phase": {phase: counts[phase] for phase in PHASES if counts[phase]},
            "by_case": {case.name: {phase: case.kills[phase] for phase in PHASES} for case in self.cases},
            "runs_compared": sum(case.runs for case in self.cases),
            "steps_again": {
                "largest": max(again, default=0),
                "total": sum(again),
                "by_case": {case.name: {"largest": max(case.again, default=0), "from_save_to_save": case.interval} for case in self.cases},
            },
            "rows_left_preprocessing": {"least": min(left, default=0), "most": max(left, default=0)},
            "faults": {case.name: case.faults for case in self.cases if case.faults},
        }


def prepare(room: Path) -> dict[str, Any]:
    """A tiny model, data of which a part is streamed as if from a hub, and the keys that all cases share."""
    import datasets
    import torch

    from conftest import RECORDS, build_model
    from finery.data.streams import StreamTable

    torch.set_num_threads(1)
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
        "save_total_limit": 3, "report_to": "none", "save_verify": False, "use_cpu": True, "preprocessing_num_workers": 1,
    }  # fmt: skip


def made_by(words: list[str]) -> dict[str, Any]:
    """What a result came from: the command as it was given, from the project's folder; the day; versions."""
    given = [str(Path(word).relative_to(ROOT)) if Path(word).is_relative_to(ROOT) else word for word in words]
    return {
        "command": shlex.join(["python", *given]),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("finery", "torch", "transformers", "peft")} | {"python": platform.python_version()},
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=210)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--result", type=Path, help="a file for the report, with the command, the date and versions")
    args = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        import finery.commands.train
        import finery.training.session
        import finery.training.trainer  # noqa: F401 -- before the first fork

        found = Campaign(args.cases, args.kills, args.seed, Path(folder), prepare(Path(folder))).run()
    text = json.dumps(made_by(sys.argv) | found | {"seconds": round(time.time() - began)}, indent=1)
    print(text)
    if args.result is not None:
        args.result.write_text(text + "\n", encoding="utf-8")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
