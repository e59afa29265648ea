"""Tokens on disk: what is written is read back, what is damaged is noticed, and nothing is taken for what it is not."""

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finery.data.content import ContentGuard, identify
from finery.data.rows.base import IGNORED, Cut, Encoded, Row
from finery.data.store import StoreWriter, TokenStore, check_key, code_version
from finery.errors import UserError
from letters import Answers, in_order, letter_rows, open_sets, write_texts

KEY = {"cutoff_len": 9, "files": "abc"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for every test."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))


def made_up_row(dice: np.random.Generator) -> Row:
    """A row of any length, with labels that are hidden, learnt, or odd."""
    size = int(dice.choice([1, 2, 7, 8, 9, 31, 32, 33, 200]))
    ids = dice.integers(0, 2**31 - 1, size).astype(np.int32)
    labels = np.where(dice.random(size) < dice.choice([0, 0.3, 1]), ids, IGNORED).astype(np.int32)
    for place in np.flatnonzero(dice.random(size) < dice.choice([0, 0.1])):
        labels[place] = dice.integers(0, 999)  # such as an end token that is learnt where another stands
    return Row(ids, labels)


def made_up(dice: np.random.Generator) -> Encoded:
    """What a sample may become: no row, one or several."""
    rows = tuple(made_up_row(dice) for _ in range(dice.choice([0, 1, 1, 1, 2, 9])))
    learnt = sum(row.num_supervised for row in rows)
    reason = "" if rows else str(dice.choice(["x", "", "warum nicht? é 好", "four"]))
    return Encoded(rows, reason, int(dice.integers(0, 99)), Cut.END_LOST, learnt)


def same(rows: list[Row] | None, one: Encoded) -> bool:
    """Whether these are the rows of a sample."""
    pairs = None if rows is None or len(rows) != len(one.rows) else zip(rows, one.rows, strict=True)
    return pairs is not None and all(
        a.ids.dtype == a.labels.dtype == np.int32 and np.array_equal(a.ids, b.ids) and np.array_equal(a.labels, b.labels) for a, b in pairs
    )


def filled(folder: Path, count: int = 300, shard_bytes: int = 3000) -> tuple[TokenStore, list[Encoded]]:
    """A store of made-up samples, written by two writers in turn."""
    dice = np.random.default_rng(0)
    store = TokenStore.create(folder, count, KEY)
    writers, samples = (StoreWriter(store), StoreWriter(store)), [made_up(dice) for _ in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finery.data.store.SHARD_BYTES", shard_bytes)
        for turn, some in enumerate(np.array_split(dice.permutation(count), 20)):
            writers[turn % 2].put(some.tolist(), [samples[record] for record in some])
    for writer in writers:
        writer.close()
    return store, samples


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store, samples = filled(tmp_path / "store")
    assert len(list((tmp_path / "store").glob("shard-*.bin"))) > 5
    for opened in (store, TokenStore.create(tmp_path / "store", 300, KEY), pickle.loads(pickle.dumps(store))):
        for record in np.random.default_rng(1).permutation(300).tolist():
            assert same(opened.read(record), samples[record])
            assert samples[record].rows or opened.reason(record) == samples[record].reason
        assert opened.has(np.arange(300)).all()
        entries = opened.entries
        assert entries["num_ids"].tolist() == [sum(len(row.ids) for row in one.rows) for one in samples]
        assert entries["num_supervised"].tolist() == [one.num_supervised for one in samples]
        assert entries["num_rows"].tolist() == [len(one.rows) for one in samples]
        assert entries["num_cut"].tolist() == [one.num_cut for one in samples]


def test_what_is_not_written_is_not_there(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "store", 5, KEY)
    sample = Encoded((Row(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32)),))
    StoreWriter(store).put([3], [sample])
    assert [store.read(record) is None for record in range(5)] == [True, True, True, False, True]
    assert store.has(np.array([3, 4, 3])).tolist() == [True, False, True]
    store.entries["present"][3] = 0
    assert store.read(3) is None
    assert len(TokenStore.create(tmp_path / "empty", 0, KEY).entries) == 0
    TokenStore.create(tmp_path / "large", 100_000, KEY)
    index = (tmp_path / "large" / "index.bin").stat()
    assert index.st_blocks * 512 >= index.st_size, "no hole, which could not be filled on a full disk"


def test_a_sample_of_very_many_rows(tmp_path: Path) -> None:
    """A book that is split."""
    store = TokenStore.create(tmp_path / "store", 1, KEY)
    row = Row(np.arange(2, dtype=np.int32), np.arange(2, dtype=np.int32))
    StoreWriter(store).put([0], [Encoded((row,) * 33_000)])
    assert len(store.read(0) or ()) == 33_000


@pytest.mark.parametrize("what", ["shard-*.bin", "index.bin"])
def test_damaged_bytes_are_noticed(tmp_path: Path, what: str) -> None:
    """Whatever byte of it is changed: a sample is read as it was, or not at all."""
    folder, count = tmp_path / "store", 80
    _, samples = filled(folder, count)
    dice = np.random.default_rng(2)
    lost = 0
    for _ in range(50):
        path = dice.choice(np.array(sorted(folder.glob(what))))
        content = bytearray(path.read_bytes())
        place = int(dice.integers(len(content)))
        if what == "index.bin" and place % (len(content) // count) > 39:
            continue  # counts for the ledger, by which nothing is read
        kept, content[place] = content[place], content[place] ^ (1 << int(dice.integers(8)))
        path.write_bytes(content)
        store = TokenStore(folder, count)
        found = [store.read(record) for record in range(count)]
        lost += sum(rows is None for rows in found)
        assert all(rows is None or same(rows, one) for rows, one in zip(found, samples, strict=True))
        content[place] = kept
        path.write_bytes(content)
    assert lost > 10


def test_what_is_damaged_or_lost_is_encoded_anew(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(100)] + [""]
    entry = {"x": write_texts(tmp_path / "x.jsonl", texts)}
    open_sets(entry, letter_rows(kind=Answers), tokenized_path=str(tmp_path / "tokens"))
    for damage in ("bytes", "end", "file"):
        (shard, *_) = sorted((tmp_path / "tokens" / "x").glob("shard-*.bin"))
        content = bytearray(shard.read_bytes())
        if damage == "bytes":
            content[8::40] = b"?" * len(content[8::40])
            shard.write_bytes(content)
        elif damage == "end":
            shard.write_bytes(content[:101])
        else:
            shard.unlink()
        sets = open_sets(entry, letter_rows(kind=Answers), tokenized_path=str(tmp_path / "tokens"))
        assert in_order(sets.train) == texts[:-1]


def test_a_write_that_broke_off_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full within a word: what stands before it in the shard is read as ever."""
    folder = tmp_path / "store"
    store, samples = filled(folder, 50, 1 << 20)
    writer, write, taken = StoreWriter(store), os.write, []

    def full(descriptor: int, data: Any) -> int:
        if taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken.append(write(descriptor, data[: len(data) // 8 * 4 + 3]))
        return taken[0]

    store.entries["present"][7] = 0
    writer.put([7], [samples[7]])
    store.entries["present"][9] = 0
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        writer.put([9], [Encoded((made_up_row(np.random.default_rng(5)),) * 9)])
    monkeypatch.undo()
    assert any(path.stat().st_size % 4 for path in folder.glob("shard-*.bin"))
    opened = TokenStore(folder, 50)
    assert all(same(opened.read(record), samples[record]) for record in range(50) if record != 9)
    assert opened.read(9) is None
    StoreWriter(opened).put([9], [samples[9]])
    assert same(opened.read(9), samples[9])


def test_a_key_is_told_apart_in_words(tmp_path: Path) -> None:
    TokenStore.create(tmp_path, 5, KEY)
    check_key(tmp_path, KEY, 5)
    check_key(tmp_path / "none", KEY, 5)
    with pytest.raises(UserError) as told:
        check_key(tmp_path, {"cutoff_len": 8, "files": "abd", "new": [1]}, 6)
    said = "size was 5, is 6; cutoff_len was 9, is 8; files differ; new was null, is [1]. Name another folder, or delete this one"
    assert str(told.value) == f"'tokenized_path': {tmp_path} was written with other settings: {said}"
    (tmp_path / "key.json").write_text('{"size": 5, "cut')  # the machine went down
    with pytest.raises(UserError, match=r"key\.json cannot be read\. Name another folder"):
        check_key(tmp_path, KEY, 5)


def test_the_version_is_that_of_what_shapes_tokens() -> None:
    assert code_version() == code_version()
    assert len(code_version()) == 32


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, Any]:
    """A data set of 40 texts."""
    return {"x": write_texts(tmp_path / "x.jsonl", [f"text {n}" for n in range(40)])}


def num_encoded(entry: dict[str, Any], cutoff_len: int = 64, **options: Any) -> int:
    """How many samples a start has to encode until all of them are there."""
    sets = open_sets(entry, letter_rows(cutoff_len), **options)
    assert len(in_order(sets.train)) == len(set(in_order(sets.train)))
    sets.stop()
    assert sets.encoder is not None
    return sets.encoder.num_done()


def test_a_second_start_encodes_nothing(entry: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert num_encoded(entry) == 40
    assert num_encoded(entry) == 0
    os.utime(path, (1, 1))
    assert num_encoded(entry) == 0, "only the time has changed"
    path.write_bytes(path.read_bytes())
    assert num_encoded(entry) == 0, "written again as it was"
    path.write_text(path.read_text().replace("text 7", "text & 7"))
    assert num_encoded(entry) == 40
    assert num_encoded(entry, cutoff_len=32) == 40
    assert num_encoded(entry | {"x": entry["x"] | {"split": "train[:10]"}}) == 0
    assert num_encoded(entry, overwrite_cache=True) == 40


def test_tokens_in_a_folder_of_the_users_own(entry: dict[str, Any], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    found = [num_encoded(entry, tokenized_path=str(tokens)) for _ in range(2)]
    assert found == [40, 0]
    assert {path.name for path in (tokens / "x").iterdir()} == {"index.bin", "key.json", "lock", "shard-00000.bin"}
    assert not (tmp_path / "cache" / "encoded").exists()
    with pytest.raises(UserError, match=r"was written with other settings: cutoff_len was 64, is 32\. Name another folder"):
        num_encoded(entry, 32, tokenized_path=str(tokens))
    assert num_encoded(entry, 32, tokenized_path=str(tokens), overwrite_cache=True) == 40
    assert json.loads((tokens / "x" / "key.json").read_text())["cutoff_len"] == 32
    (tmp_path / "x.jsonl").write_text('{"text": "changed"}\n{"text": "since"}\n')
    with pytest.raises(UserError, match=r"with other settings: size was 40, is 2; files differ\. Name"):
        num_encoded(entry, 32, tokenized_path=str(tokens))
    assert num_encoded(entry, 32, tokenized_path=str(tokens), overwrite_cache=True) == 2


@pytest.mark.parametrize("name", ["dataset_dict.json", "state.json"])
def test_tokens_of_another_program_are_refused(entry: dict[str, Any], tmp_path: Path, name: str) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / name).write_text("{}")
    for anew in (False, True):
        with pytest.raises(UserError, match="holds data that another program has encoded; name another folder"):
            num_encoded(entry, tokenized_path=str(tmp_path / "tokens"), overwrite_cache=anew)
    assert (tmp_path / "tokens" / name).exists(), "nothing of it is touched"


def test_data_sets_of_like_names_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(Path("a/b.jsonl"), ["one", "two"])
    write_texts(Path("a_b.jsonl"), ["three", "four"])
    for anew in (False, False, True):
        sets = open_sets({}, dataset="a/b.jsonl, a_b.jsonl", tokenized_path="tokens", overwrite_cache=anew)
        assert in_order(sets.train) == ["one", "two", "three", "four"]


def changed_in_secret(path: Path, old: str, new: str) -> None:
    """Change a file, with its size, time and inode as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        content = file.read().replace(old.encode(), new.encode())
        file.seek(0)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)


def test_a_file_changed_in_secret_stops_the_run(entry: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert num_encoded(entry) == 40
    changed_in_secret(path, "text 39", "TEXT 39")
    with pytest.raises(UserError, match=r"x\.jsonl was changed in a way that left its size, time and inode as they were.*start again"):
        sets = open_sets(entry)  # which may be told at once
        assert sets.encoder is not None
        assert sets.encoder.guard is not None
        sets.encoder.guard.join(60)
        in_order(sets.train)
    assert num_encoded(entry) == 40, "the next start knows the new content"
    assert num_encoded(entry) == 0
    changed_in_secret(path, "TEXT 39", "text 39")
    with pytest.raises(UserError, match="was changed"), open_sets(entry) as sets:
        sets.confirm()
    changed_in_secret(path, "text 39", "TEXT 39")
    with pytest.raises(UserError, match="was changed"), open_sets(entry) as sets:
        sets.confirm()
    assert num_encoded(entry) == 40, "nothing is used that was encoded under a wrong name"


def test_files_that_were_read_whole_are_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("one")
    first, remembered = identify(path)
    assert not remembered
    assert identify(path) == (first, True)
    assert identify(path, anew=True) == (first, False)
    changed_in_secret(path, "one", "two")
    assert identify(path) == (first, True)
    guard = ContentGuard({path: first})
    guard.join(10)
    assert "was changed" in guard.problem
    assert identify(path)[0] != first
    assert not ContentGuard({}).is_alive()
