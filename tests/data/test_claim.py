"""Who writes a store: runs at the same time, the processes of one run, and runs that were killed."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import finery.data.claim
from finery.errors import UserError
from letters import Answers, in_order, letter_rows, open_sets, slowly, write_texts

SOON = 5.0
"""Seconds within which a run that was killed leaves nothing behind."""
TEXTS = [f"text {n:04d}" for n in range(600)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, Any]:
    """A registry of one data set of 600 texts."""
    return {"x": write_texts(tmp_path / "x.jsonl", TEXTS)}


def rest(entry: dict[str, Any]) -> int:
    """How many samples the next start has to encode; it must find all of them right."""
    sets = open_sets(entry)
    assert in_order(sets.train) == TEXTS
    sets.stop()
    assert sets.encoder is not None
    return sets.encoder.num_done()


Work = Callable[[Any], None]


@contextlib.contextmanager
def another_run(work: Work, **environment: str) -> Iterator[tuple[Any, Any]]:
    """A process of its own that does `work` with the end of a pipe: it, and the other end."""

    def begin(says: Any) -> None:
        finery.data.claim._HELD.clear()  # the locks of this process are not that one's
        os.environ.update(environment)
        work(says)

    context = multiprocessing.get_context("fork")
    heard, says = context.Pipe()
    process = context.Process(target=begin, args=(says,))
    process.start()
    says.close()
    try:
        yield process, heard
    finally:
        process.kill()
        process.join()


def heard_from(other: Any) -> Any:
    """What another process says next; it may not be silent for long."""
    assert other.poll(60), "nothing is heard"
    return other.recv()


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely to be buried."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_killed_run_leaves_no_process_and_the_next_goes_on(entry: dict[str, Any], cache: Path) -> None:
    def work(says: Any) -> None:
        sets = open_sets(entry, letter_rows(seen=slowly(0.002)), preprocessing_num_workers=2)
        assert sets.encoder is not None
        assert sets.train is not None
        sets.train.advance(0, 1)
        says.send([process.pid for process in sets.encoder._processes])
        while True:
            says.send(sets.encoder.num_done())
            time.sleep(0.01)

    with another_run(work) as (process, heard):
        helpers = heard_from(heard)
        while heard_from(heard) < 200:
            pass
        assert all(map(is_running, helpers))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        since = time.monotonic()
        assert 0 < rest(entry) <= len(TEXTS) - 200, "the lock and what was encoded are the next run's at once"
        while any(map(is_running, helpers)):
            assert time.monotonic() - since < SOON
            time.sleep(0.02)
    assert len(list((cache / "encoded").iterdir())) == 1


def test_two_runs_at_once(entry: dict[str, Any], cache: Path) -> None:
    """Each has a store of its own; later ones find both free."""

    def work(says: Any) -> None:
        sets = open_sets(entry, letter_rows(seen=slowly(0.001)))
        says.send("begun")
        says.send(in_order(sets.train))
        assert sets.encoder is not None
        says.send((sets.encoder.num_done(), sets.encoder.feeds[0].stores[0].folder.name))
        says.recv()

    with another_run(work) as (_, one), another_run(work) as (_, other):
        assert [heard_from(one), heard_from(other)] == ["begun", "begun"]
        assert heard_from(one) == heard_from(other) == TEXTS
        (done, first), (done_too, second) = heard_from(one), heard_from(other)
        assert done == done_too == len(TEXTS)
        assert {first, second} == {path.name for path in (cache / "encoded").iterdir()}
        assert abs(len(first) - len(second)) == len(".2")
    assert rest(entry) == 0
    with another_run(work) as (_, one):
        assert heard_from(one) == "begun"
        assert heard_from(one) == TEXTS
        assert heard_from(one)[0] in (0, len(TEXTS))  # this process holds the first store still


def test_a_folder_of_the_users_own_has_one_writer(entry: dict[str, Any], tmp_path: Path) -> None:
    tokens = str(tmp_path / "tokens")

    def work(says: Any) -> None:
        open_sets(entry, letter_rows(kind=Answers), tokenized_path=tokens)
        says.send("done")
        says.recv()

    with another_run(work) as (_, heard):
        assert heard_from(heard) == "done"
        with pytest.raises(UserError, match=r"tokens/x is being written by another run; wait for its end or name another folder"):
            open_sets(entry, letter_rows(kind=Answers), tokenized_path=tokens)
    sets = open_sets(entry, letter_rows(kind=Answers), tokenized_path=tokens)
    assert sets.encoder is not None
    assert sets.encoder.num_done() == 0


RUN = {"MASTER_ADDR": "here", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}


def rank(entry: dict[str, Any], number: int, **options: Any) -> Any:
    """A process of the run that `RUN` names; it sends its texts, how many it has encoded, and with how many processes."""

    def work(says: Any) -> None:
        sets = open_sets(entry, letter_rows(seen=slowly(0.001)), **options)
        assert sets.encoder is not None
        says.send((in_order(sets.train), sets.encoder.num_done(), len(sets.encoder._processes)))
        says.recv()

    return another_run(work, **RUN, LOCAL_RANK=str(number))


def test_other_processes_of_a_run_read_what_the_first_writes(entry: dict[str, Any], cache: Path) -> None:
    """Whichever of them is there first."""
    with rank(entry, 1) as (_, early):
        time.sleep(0.3)
        with rank(entry, 0) as (_, writer), rank(entry, 2) as (_, late):
            assert heard_from(writer) == (TEXTS, len(TEXTS), 1)
            assert heard_from(early) == heard_from(late) == (TEXTS, 0, 0)
    assert len(list((cache / "encoded").iterdir())) == 1


@pytest.mark.parametrize("anew", [False, True])
def test_a_run_of_the_same_name_that_has_ended_is_not_waited_for(entry: dict[str, Any], cache: Path, anew: bool) -> None:
    """torchrun calls every run `none` unless it is told otherwise; here the earlier one had half of a second store."""
    sets = open_sets(entry)
    with rank(entry, 0) as (process, _):
        while not list((cache / "encoded").glob("*.2/shard-*")):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    sets.stop()
    with rank(entry, 1, overwrite_cache=anew) as (_, reader):
        time.sleep(0.3)
        with rank(entry, 0, overwrite_cache=anew) as (_, writer):
            assert heard_from(writer)[0] == TEXTS
            assert heard_from(reader) == (TEXTS, 0, 0)
