"""Records of files, read by number: every kind of file, and every way in which one may be broken."""

import codecs
import contextlib
import gzip
import json
import math
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from finery.data.files import open_table
from finery.data.sample import BadRecord
from finery.data.tables.base import Table
from finery.errors import UserError

Open = Callable[..., Table]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for every test."""
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))


def zstd(content: bytes) -> bytes:
    """Compressed by zstd."""
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return out.getvalue().to_pybytes()


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Write a file and open its table."""

    def write(name: str, content: str | bytes) -> Table:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return open_table(path, False, {})

    return write


@pytest.fixture
def complaint(opened: Open, tmp_path: Path) -> Callable[..., str]:
    """The complaint about a file, without its folder."""

    def tell(name: str, content: str | bytes) -> str:
        with pytest.raises(UserError) as told:
            opened(name, content)
        assert not list((tmp_path / "cache" / "files").glob("[0-9a-f]*.json*/")), "nothing half-made is kept"
        return str(told.value).replace(f"{tmp_path}/", "")

    return tell


def rows(table: Table) -> list[Any]:
    """All records; a broken one is what is said of it."""
    found = []
    for row in range(len(table)):
        try:
            found.append(table[row])
        except BadRecord as error:
            found.append(str(error))
    return found


def lines(table: Table) -> list[int | None]:
    """The line of each record."""
    return [table.line(row) for row in range(len(table))]


RECORDS = [{"a": 1, "b": "x"}, {"a": 2, "b": 'é 好 \u2028 "\\', "c": [{"d": None}]}, {"a": 3, "b": ""}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
BOM = codecs.BOM_UTF8.decode()


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, ensure_ascii=False),
        json.dumps(RECORDS, ensure_ascii=False, indent=2) + "\n\n",
        json.dumps(RECORDS, ensure_ascii=False, indent="\t").replace("\n", "\r\n"),
        BOM + json.dumps(RECORDS, ensure_ascii=False),
        "\n \t" + json.dumps(RECORDS, separators=(",", ":")) + " ",
        LINES,
        BOM + LINES,
        LINES.removesuffix("\n"),
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\n\n \t\n"),
        "\n\r\n" + LINES,
    ],
)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "x.jsonl.zst"])
def test_lists_and_lines(opened: Open, name: str, text: str) -> None:
    """Whichever of the two a .json or .jsonl holds."""
    packed = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    assert rows(opened(name, packed(text.encode()))) == RECORDS


@pytest.mark.parametrize("window", [3, 4, 7, 16, 61, 1 << 22])
def test_values_across_the_border_of_what_is_held(opened: Open, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finery.data.tables.json._WINDOW_BYTES", window)
    values = [*RECORDS, 12345678901234567890, -0.5e-7, 1.5, True, None, "", "好" * 50, [], {}]
    values += [[[[[1, [2]]]]], {"long": "y" * 400}]
    for indent in (None, 3):
        table = opened(f"x{indent}.json", json.dumps(values, ensure_ascii=False, indent=indent))
        assert rows(table) == values
        assert [table[row] for row in (9, 0, 13, 2)] == [values[row] for row in (9, 0, 13, 2)]


def test_huge_values(opened: Open) -> None:
    values = [{"text": "好" * 3_000_000}, {"text": "small"}, {"list": list(range(900_000))}, {"text": "last"}]
    table = opened("x.json", json.dumps(values, ensure_ascii=False))
    assert [len(table), table[1], table[3], table[0], table[2]] == [4, values[1], values[3], values[0], values[2]]


def test_a_line_may_be_found_again(opened: Open) -> None:
    assert lines(opened("x.jsonl", '{"a": 1}\n{"a": 2}\n')) == [1, 2]
    assert lines(opened("x.jsonl", '{"a": 1}\n\n{"a": 2}\n')) == [1, 3]
    assert lines(opened("x.jsonl", '\n{"a": 1}\n{"a": 2}')) == [2, 3]
    assert lines(opened("x.jsonl", f'{BOM}{{"a": 1}}\r\n\r\n\n{{"a": 2}}')) == [1, 4]
    assert lines(opened("x.json", json.dumps([{"é": 1}, {"é": 2}], indent=1))) == [2, 5]
    assert lines(opened("x.json", '[{"a": 1}, {"a": 2},\n\n{"a": 3}]')) == [1, 1, 3]
    assert lines(opened("x.csv", 'a,b\n1,"two\nlines"\n\n3,4\n')) == [2, 5]
    assert lines(opened("x.txt", "a\n\nb")) == [1, 2, 3]


def test_empty_lists(opened: Open) -> None:
    assert len(opened("x.json", "[]")) == len(opened("y.json", f"{BOM}[ \n ]\n")) == len(opened("x.jsonl", " \n\n")) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1},\n {"b" 2}]', "x.json:2: this is not JSON: Expecting ':' delimiter"),
        ('[{"a": 1},\n\n]', "x.json:3: this is not JSON: a comma stands before the end of the list"),
        ('[{"a": 1}\n{"a": 2}]', "x.json:2: this is not JSON: a comma or the end of the list is due"),
        ('[{"a": 1},\n{"a": "cut of', "x.json:2: this is not JSON: the file ends within a record"),
        ('[{"a": 1},\n', "x.json:2: this is not JSON: the file ends within the list"),
        ('[{"a": 1}\n', "x.json:2: this is not JSON: the file ends within the list"),
        ("[", "x.json:1: this is not JSON: the file ends within the list"),
        ('[{"a": [1, 2', "x.json:1: this is not JSON: the file ends within a record"),
        ("[]\n{}", "x.json:2: this is not JSON: something follows after the end of the list"),
        ('[{"a": 1}]\n[{"a": 2}]', "x.json:2: this is not JSON: something follows after the end of the list"),
        ("['a']", "x.json:1: this is not JSON: Expecting value"),
        ("[" * 100_000, "x.json:1: this is not JSON: values are nested too deeply"),
        ('{\n "a": 1\n}', "x.json holds one JSON object; it should hold a list of records, or one record a line"),
        ("", "x.json is empty; it should hold records"),
        ("[1]".encode("utf-16"), "x.json is text in UTF-16; save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "x.json is not text: it holds zero bytes; is it the right file?"),
        (b"PAR1....PAR1", "x.json is a parquet file; let its name end in .parquet"),
        (b"ARROW1\0\0....", "x.json is an arrow file; let its name end in .arrow"),
        (b"PK\x03\x04....", "x.json is a zip archive; unpack it"),
        (gzip.compress(b"[]", mtime=0), "x.json is compressed by gzip; let its name end in .gz"),
        (zstd(b"[]"), "x.json is compressed by zstd; let its name end in .zst"),
    ],
)
def test_broken_lists(complaint: Callable[..., str], text: str | bytes, words: str) -> None:
    assert complaint("x.json", text) == words
    content = text.encode() if isinstance(text, str) else text
    if content:
        assert complaint("x.json.gz", gzip.compress(content, mtime=0)) == words.replace("x.json", "x.json.gz")


def packed(times: int) -> bytes:
    """`LINES` so many times, the same bytes at any time of day."""
    return gzip.compress(LINES.encode() * times, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", 'a,b\n1,2\n"x"y,3\n', "x.csv:3: this is not CSV: ',' expected after '\"'"),
        ("x.csv", 'a,b\n"x\ny",1\n"open,3\n', "x.csv:4: this is not CSV: unexpected end of data"),
        ("x.csv", "b,a,,a,b\n1,2\n", "x.csv:1: the header names 'a', 'b' twice"),
        ("x.csv", b"a,b\n1,2\n3,\xe9\n", "x.csv is not UTF-8 (after line 1: byte 0xe9); save it as UTF-8"),
        ("x.csv", zstd(b"a,b\n1,2\n"), "x.csv is compressed by zstd; let its name end in .zst"),
        ("x.txt", "", "x.txt is empty; it should hold records"),
        ("x.csv", "", "x.csv is empty; it should hold records"),
        ("x.txt", b"\0" * 9, "x.txt is not text: it holds zero bytes; is it the right file?"),
        ("x.jsonl", b"\xfe\xff\0[", "x.jsonl is text in UTF-16; save it as UTF-8"),
        (
            "x.jsonl.gz",
            packed(99)[:-9],
            "x.jsonl.gz cannot be unpacked, it may be cut off: Compressed file ended",
        ),
        ("x.jsonl.gz", packed(1)[:5], "x.jsonl.gz cannot be unpacked, it may be cut off: "),
        (
            "x.jsonl.gz",
            packed(9)[:30] + b"\xff" * 30,
            "x.jsonl.gz cannot be unpacked, it may be cut off: ",
        ),
        ("x.txt.gz", b"plain text", "x.txt.gz cannot be unpacked, it may be cut off: Not a gzipped file"),
        ("x.csv.gz", b"", "x.csv.gz is empty; it should hold records"),
        ("x.jsonl.zst", zstd(LINES.encode() * 99)[:-9], "x.jsonl.zst cannot be unpacked, it may be cut off: "),
        ("x.json.zst", b"[]", "x.json.zst cannot be unpacked, it may be cut off: "),
        ("x.parquet", "[1]", "x.parquet cannot be read as a parquet file: Parquet file size is 3 bytes"),
        ("x.parquet", b"", "x.parquet cannot be read as a parquet file: Parquet file size is 0 bytes"),
        ("x.arrow", "[1]", "x.arrow cannot be read as an arrow file: "),
        ("x.arrow", b"", "x.arrow cannot be read as an arrow file: "),
    ],
)
def test_files_that_are_not_what_they_say(complaint: Callable[..., str], name: str, content: str | bytes, words: str) -> None:
    told = complaint(name, content)
    assert told.startswith(words)
    assert "\n" not in told


def test_broken_lines_are_told_one_by_one(opened: Open) -> None:
    good = json.dumps({"a": "\u2028 \u0085 \x0b"}, ensure_ascii=False).encode().replace(b"\\u000b", b" ")
    deep = b'{"a": ' + b"[" * 100_000
    content = b"\n".join([good, b'{"a" 2}', '{"a": "é"}'.encode("latin-1"), deep, b'{"a": 1} {"a": 2}', b"\xef\xbb\xbf{}", b"nan", good])
    first, *broken, last = rows(opened("x.jsonl", content))
    assert first == last == {"a": "\u2028 \u0085  "}
    assert broken == [
        "this line is not JSON: Expecting ':' delimiter (column 6)",
        "the record is not UTF-8 (byte 7: 0xe9); save the file as UTF-8",
        "this line nests its values too deeply to be read",
        "this line is not JSON: Extra data (column 10)",
        "this line is not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) (column 1)",
        "this line is not JSON: Expecting value (column 1)",
    ]
    latin = '{"a": "é"}\n{"a": 1}\n'.encode("latin-1")  # in a .json, too, which might be one object over several lines
    assert rows(opened("x.json", latin)) == ["the record is not UTF-8 (byte 7: 0xe9); save the file as UTF-8", {"a": 1}]
    assert rows(opened("x.json", deep + b"\n{}")) == ["this line nests its values too deeply to be read", {}]
    told = "the record is not UTF-8 (byte 7: 0xe9); save the file as UTF-8"
    assert rows(opened("x.json", b'[{"a": "\xe9"}, {"a": "\xc3\xa9"}]')) == [told, {"a": "é"}]
    long = "1" * 5000
    for name, text in (("x.json", f'[{{"a": {long}}}, {{}}]'), ("x.jsonl", f'{{"a": {long}}}\n{{}}')):
        said, other = rows(opened(name, text))
        assert said.startswith("this line is not JSON that can be read: Exceeds the limit (4300 digits)")
        assert other == {}
    assert math.isnan(rows(opened("x.json", '[{"a": NaN}]'))[0]["a"])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("begin", ["", BOM])
def test_csv(opened: Open, begin: str, end: str) -> None:
    text = begin + 'instruction,output,,z\n1,NA\n"a ""b"", c","two\n\nlines",dropped,\n,\n\n  x ,\u2028,,9\n1,2,3,4,5\n'.replace("\n", end)
    table = opened("x.csv", text)
    assert rows(table) == [
        {"instruction": "1", "output": "NA", "z": None},
        {"instruction": 'a "b", c', "output": f"two{end}{end}lines", "z": None},
        {"instruction": None, "output": None, "z": None},
        {"instruction": "  x ", "output": "\u2028", "z": "9"},
        "the row has 5 cells where the header has 4",
    ]
    assert lines(table) == [2, 3, 6, 8, 9]
    assert len(opened("y.csv", f"{begin}a,b{end}")) == 0


def test_txt(opened: Open) -> None:
    assert [row["text"] for row in rows(opened("x.txt", f"{BOM}one\r\n\n two \u2028\n\x0b\nend"))] == [
        "one",
        "",
        " two \u2028",
        "\x0b",
        "end",
    ]
    assert rows(opened("y.txt.gz", gzip.compress(b"a\n", mtime=0) + gzip.compress(b"b\n", mtime=0))) == [{"text": "a"}, {"text": "b"}]
    assert rows(opened("y.txt.zst", zstd(b"a\n") + zstd(b"\xe9\n"))) == [
        {"text": "a"},
        "the record is not UTF-8 (byte 0: 0xe9); save the file as UTF-8",
    ]


WIDE = pa.table(
    {
        "text": [f"é {n}" for n in range(2000)],
        "messages": [[{"role": "user", "content": str(n)}] * (n % 3) for n in range(2000)],
        "none": [None if n % 2 else n / 4 for n in range(2000)],
        "word": pa.array([f"w{n % 5}" for n in range(2000)]).dictionary_encode(),
    }
)


def test_parquet(opened: Open, tmp_path: Path) -> None:
    for compression, size in (("zstd", 700), ("none", 2000), ("snappy", 1)):
        table = WIDE if size > 1 else WIDE.slice(0, 40)
        parquet.write_table(table, tmp_path / "x", row_group_size=size, compression=compression)
        found = opened("x.parquet", (tmp_path / "x").read_bytes())
        assert rows(found) == table.to_pylist()
        assert found.line(5) is None
    parquet.write_table(WIDE.slice(0, 0), tmp_path / "x")
    assert len(opened("x.parquet", (tmp_path / "x").read_bytes())) == 0
    parquet.write_table(WIDE, tmp_path / "x")
    with pytest.raises(UserError, match=r"x\.parquet cannot be read as a parquet file"):
        opened("x.parquet", (tmp_path / "x").read_bytes()[:-20])


def test_arrow(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream format, as `datasets` writes it, and the file format."""
    monkeypatch.setattr("finery.data.tables.arrow._KEPT_ROWS", 300)
    batches = [*WIDE.slice(0, 700).to_batches(), *WIDE.slice(0, 0).to_batches(), *WIDE.slice(700).to_batches(max_chunksize=99)]
    for new in (pa.ipc.new_stream, pa.ipc.new_file):
        with new(str(tmp_path / "x"), WIDE.schema) as out:
            for batch in batches:
                out.write_batch(batch)
        assert rows(opened("x.arrow", (tmp_path / "x").read_bytes())) == WIDE.to_pylist()
    with pa.ipc.new_stream(str(tmp_path / "x"), WIDE.schema):
        pass
    assert len(opened("x.arrow", (tmp_path / "x").read_bytes())) == 0


def test_what_datasets_saves(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    (path,) = (tmp_path / "saved").glob("*.arrow")
    assert rows(open_table(path, False, {})) == list(Dataset.from_list(RECORDS))


LETTERS = "ab é好😀\u2028\u0085\t\n\r\"\\,{}[]: \x0b\x1f'"


def made_up(dice: random.Random, depth: int = 3) -> Any:
    """A value of any kind that JSON has."""
    kinds = 8 if depth else 6
    match dice.randrange(kinds):
        case 0:
            return dice.choice([None, True, False])
        case 1:
            return dice.randrange(-(10 ** dice.randrange(1, 20)), 10**9)
        case 2:
            return dice.choice([0.1, -1e300, 5e-324, -0.0, 1.0])
        case 6:
            return [made_up(dice, depth - 1) for _ in range(dice.randrange(4))]
        case 7:
            return {made_text(dice): made_up(dice, depth - 1) for _ in range(dice.randrange(4))}
    return made_text(dice)


def made_text(dice: random.Random) -> str:
    """A text with all that may be taken for the end of something."""
    return "".join(dice.choices(LETTERS, k=dice.choice([0, 1, 5, 70])))


def flat(dice: random.Random) -> dict[str, Any]:
    """A record of columns that each hold one kind."""
    turns = [{"role": made_text(dice), "n": dice.choice([None, 1])} for _ in range(dice.randrange(3))]
    return {"text": made_text(dice), "turns": turns, "n": dice.choice([None, dice.randrange(1 << 40)])}


def written(records: list[Any], kind: str, dice: random.Random) -> bytes:
    """The bytes of a file of some kind."""
    if kind == "parquet":
        out = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(records), out, row_group_size=dice.randrange(1, 40))
        return out.getvalue().to_pybytes()
    ascii = dice.random() < 0.3
    if kind == "json":
        return json.dumps(records, ensure_ascii=ascii, indent=dice.choice([None, 0, 2])).encode()
    end = dice.choice(["\n", "\r\n", "\n\n", "\n \r\n"])
    return end.join(json.dumps(record, ensure_ascii=ascii) for record in records).encode() + dice.choice([b"", b"\n"])


def read_in_a_fork(table: Table, order: list[int], expected: list[Any]) -> bool:
    """Whether another process, which got the table by a fork, reads the same."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = int([table[row] for row in order] != expected)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_any_records_read_back_in_any_order(opened: Open, kind: str, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seeded search for records that do not; after a fork and a pickle, too, whether or not the table was read before."""
    dice = random.Random(f"{kind}{packing}")
    for turn in range(9):
        monkeypatch.setattr("finery.data.tables.json._WINDOW_BYTES", dice.choice([3, 17, 100, 1 << 22]))
        monkeypatch.setattr("finery.data.tables.jsonl.CHUNK_BYTES", dice.choice([3, 17, 100, 1 << 24]))
        records = [flat(dice) if kind == "parquet" else {"x": made_up(dice)} for _ in range(dice.choice([1, 2, 60, 300]))]
        content = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[packing](written(records, kind, dice))
        table = opened(f"{turn}.{kind}{packing}", content)
        order = dice.sample(range(len(records)), len(records))
        expected = [records[row] for row in order]
        fresh = pickle.loads(pickle.dumps(table))
        assert len(table) == len(records)
        if turn % 3 == 0:
            assert read_in_a_fork(table, order, expected)
        assert [table[row] for row in order] == expected, turn
        if turn % 3 == 0:
            assert read_in_a_fork(table, order[::-1], expected[::-1])
        assert [fresh[row] for row in order] == expected
        assert [table[row] for row in order[::-1]] == expected[::-1]
