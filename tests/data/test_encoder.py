"""Encoding beside the training: whatever happens to a process, a row or the disk is told soon, and the next start goes on from there."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finery.data.load import Sets
from finery.data.sets import SampleSet, UnitSet
from finery.errors import UserError
from finery.training.sampler import StepSampler
from letters import in_order, letter_rows, open_sets, slowly, spell, write_texts

SOON = 5.0
"""Seconds within which trouble is told."""
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


def units_of(sets: Sets) -> UnitSet:
    """The training set."""
    assert sets.train is not None
    return sets.train


def told_soon(sets: Sets, since: float | None = None) -> BaseException:
    """What ends the loop, asked as the loop asks."""
    since = since or time.monotonic()
    with pytest.raises((UserError, RuntimeError)) as told:
        in_order(sets.train)
    assert time.monotonic() - since < SOON
    sets.stop()
    return told.value


def rest(entry: dict[str, Any], **options: Any) -> int:
    """How many samples the next start has to encode; it must find all of them right."""
    sets = open_sets(entry, **options)
    assert in_order(sets.train) == TEXTS
    sets.stop()
    assert sets.encoder is not None
    return sets.encoder.num_done()


def test_a_killed_process_is_told_and_what_it_wrote_is_used(entry: dict[str, Any]) -> None:
    sets = open_sets(entry, letter_rows(seen=slowly(0.004)))
    assert sets.encoder is not None
    units_of(sets).advance(0, 1)
    while sets.encoder.num_done() < 128:
        time.sleep(0.01)
    (process,) = sets.encoder._processes
    os.kill(process.pid, signal.SIGKILL)
    told = told_soon(sets)
    assert isinstance(told, UserError)
    place = r"was killed by signal 9 \(SIGKILL\); perhaps there was too little memory, while it was at data set 'x', x\.jsonl row \d+$"
    assert told.complaints
    with pytest.raises(UserError, match=place):
        raise told
    assert 0 < rest(entry) <= len(TEXTS) - 128


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_that_cannot_be_encoded_is_told_with_its_place(entry: dict[str, Any], packed: bool, tmp_path: Path) -> None:
    def poison(text: str) -> None:
        if text == "text 0321":
            raise ZeroDivisionError("poison")

    kind: dict[str, Any] = {"tokenized_path": str(tmp_path / "tokens")} if packed else {"sampling": "sequential"}
    since = time.monotonic()
    with pytest.raises(RuntimeError) as told:
        sets = open_sets(entry, letter_rows(seen=poison), **kind)
        raise told_soon(sets, since)
    assert time.monotonic() - since < SOON
    assert "encoding data set 'x', x.jsonl row 321 failed:\n" in str(told.value)
    assert str(told.value).rstrip().endswith("ZeroDivisionError: poison")
    assert 0 < rest(entry, **kind) < len(TEXTS)


def test_a_row_that_is_too_long_stops_the_run_where_that_is_asked_for(tmp_path: Path) -> None:
    entry = {"x": write_texts(tmp_path / "x.jsonl", [*TEXTS[:300], "long " * 20, *TEXTS[300:]])}
    told = told_soon(open_sets(entry, letter_rows(truncation="error"), sampling="sequential"))
    asked = "the text has 100 tokens, more than cutoff_len 64, and 'truncation: error' asks to stop"
    assert str(told) == f"data set 'x', x.jsonl row 300: {asked}"


def test_a_file_that_is_taken_away_is_read_to_its_end(entry: dict[str, Any], tmp_path: Path) -> None:
    """As is one that another takes the place of, which is how most editors write."""
    sets = open_sets(entry, letter_rows(seen=slowly(0.0005)))
    assert sets.encoder is not None
    units_of(sets).advance(0, 1)
    while not sets.encoder.num_done():
        time.sleep(0.005)
    write_texts(tmp_path / "y.jsonl", [text[::-1] for text in TEXTS])
    (tmp_path / "y.jsonl").replace(tmp_path / "x.jsonl")
    assert in_order(sets.train) == TEXTS
    sets.stop()


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.arrow"])
def test_a_file_that_is_changed_while_it_is_read_is_told(name: str, tmp_path: Path) -> None:
    """And none of what it says now is kept as what it said before."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = tmp_path / name

    def write(texts: list[str]) -> None:
        if name == "x.jsonl":
            write_texts(path, texts)
        elif name == "x.json":
            path.write_text(json.dumps([{"text": text} for text in texts]))
        elif name == "x.parquet":
            parquet.write_table(pa.table({"text": texts}), path, row_group_size=50)
        else:
            content = pa.BufferOutputStream()
            with pa.ipc.new_stream(content, pa.schema({"text": pa.string()})) as out:
                out.write_table(pa.table({"text": texts}))
            path.write_bytes(content.getvalue())  # in place

    write(TEXTS)
    entry = {"x": {"file_name": str(path), "columns": {"prompt": "text"}}}
    sets = open_sets(entry, letter_rows(seen=slowly(0.001)), sampling="sequential")
    assert sets.encoder is not None
    units_of(sets).advance(0, 1)
    while sets.encoder.num_done() < 100:
        time.sleep(0.01)
    write([text.upper() for text in TEXTS])
    assert str(told_soon(sets)).endswith(f"{name} was changed while this run was reading it; start again")
    with contextlib.suppress(UserError):
        in_order(open_sets(entry).train)
    write(TEXTS)
    assert 0 < rest(entry) < len(TEXTS)


def test_a_file_of_which_only_the_time_is_changed_is_read_on(entry: dict[str, Any], tmp_path: Path) -> None:
    sets = open_sets(entry, letter_rows(seen=slowly(0.0005)))
    assert sets.encoder is not None
    units_of(sets).advance(0, 1)
    while not sets.encoder.num_done():
        time.sleep(0.005)
    os.utime(tmp_path / "x.jsonl")
    assert in_order(sets.train) == TEXTS
    sets.stop()


@pytest.mark.parametrize("first", [False, True])
def test_a_full_disk_is_told(entry: dict[str, Any], first: bool, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Whether everything is encoded first, or beside the training."""
    write, room = os.write, [5000]

    def full(descriptor: int, data: Any) -> int:
        taken = write(descriptor, data[: min(len(data), room[0])]) if room[0] else 0
        room[0] -= taken
        if data and not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    options: dict[str, Any] = {"sampling": "group_by_length" if first else "sequential"}
    monkeypatch.setattr(os, "write", full)
    since = time.monotonic()
    with pytest.raises(UserError, match=r"the disk that holds the cache .* is full; make room, or set FINERY_CACHE to a folder on another"):
        raise told_soon(open_sets(entry, **options), since)
    monkeypatch.undo()
    monkeypatch.setenv("FINERY_CACHE", str(cache))
    assert 0 < rest(entry, **options) < len(TEXTS), "what was encoded so far is kept"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB; skipped where one may not be made."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt.gz", "x.parquet"])
def test_a_disk_that_is_really_full(small_disk: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it fills up while a file is unpacked or converted."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as parquet

    monkeypatch.setenv("FINERY_CACHE", str(small_disk))
    texts = [f"{n:08d} " * 12 for n in range(6000)]
    path = tmp_path / name
    if name == "x.parquet":
        parquet.write_table(pa.table({"text": texts}), path)
    else:
        lines = ["text", *texts] if name == "x.csv" else texts
        path.write_bytes((gzip.compress if name.endswith(".gz") else bytes)("\n".join(lines).encode()))
    entry = {"x": write_texts(path, texts) if name == "x.jsonl" else {"file_name": str(path), "columns": {"prompt": "text"}}}
    since = time.monotonic()
    with pytest.raises(UserError, match=r"the disk that holds the cache .* is full"):
        in_order(open_sets(entry, letter_rows(128), sampling="sequential").train)
    assert time.monotonic() - since < SOON
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    sets = open_sets(entry, letter_rows(128), sampling="sequential")
    assert in_order(sets.train) == texts
    sets.stop()


def test_it_keeps_ahead_and_goes_no_further(tmp_path: Path) -> None:
    """Only what the loop is about to take is encoded, from where it begins."""
    texts = [f"{n:05d}" for n in range(6000)]
    sets = open_sets({"x": write_texts(tmp_path / "x.jsonl", texts)}, sampling="sequential")
    assert sets.encoder is not None
    units = units_of(sets)
    units.begin(4000)
    units.advance(4000, 8)
    assert spell(units[4003]) == ["04003"]
    time.sleep(0.3)
    store = sets.encoder.feeds[0].stores[0]
    first, last = 4000 - 4000 % 64, 4000 + 1024
    assert store.entries["present"][first:last].all()
    assert not store.entries["present"][1100:first].any()
    assert not store.entries["present"][last + 128 :].any()
    sets.stop()


def test_a_sample_that_nobody_has_asked_for_is_not_waited_for(tmp_path: Path) -> None:
    """Far ahead of the loop, and when the encoding has ended."""
    texts = [f"{n:05d}" for n in range(3000)]
    sets = open_sets({"x": write_texts(tmp_path / "x.jsonl", texts)}, sampling="sequential")
    units = units_of(sets)
    since = time.monotonic()
    assert spell(units[2900]) == ["02900"]
    sets.stop()
    assert spell(units[2950]) == ["02950"]
    assert time.monotonic() - since < SOON


@pytest.mark.parametrize("workers", [1, 3])
def test_a_resumed_run_finds_every_sample_encoded(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in later epochs, and where nothing of the steps before is in the cache."""
    texts = [f"{n:05d}" for n in range(1500)]
    sets = open_sets({"x": write_texts(tmp_path / "x.jsonl", texts)}, preprocessing_num_workers=workers)
    assert sets.order is not None
    units = units_of(sets)
    assert isinstance(units, SampleSet)
    monkeypatch.setattr(SampleSet, "encode_now", lambda *_: pytest.fail("a sample was left out"))
    sampler = StepSampler(sets.order, 10, watcher=units)
    for epoch, skipped in ((2, 77), (3, 0), (4, 0)):
        sampler.set_epoch(epoch)
        sampler.skipped = skipped
        dealt = [text for step in sampler for unit in step for text in spell(units[unit])]
        assert len(set(dealt)) == len(dealt) == 1500 - 10 * skipped
    sets.stop()
