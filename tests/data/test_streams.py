"""Hub data sets that are streamed: rows as they come, steps known, the library's own reading and shuffling."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
import pytest

from finery.cli import main
from finery.data.registry import DatasetEntry, StreamSettings
from finery.data.streams import StreamTable
from finery.errors import UserError

ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(50)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`datasets.load_dataset` that streams ROWS instead of asking a hub; the list gets what it was asked for."""
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append({"path": path, "name": name, **options})
        if path == "org/gone":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/gone' doesn't exist on the Hub")
        # two shards, which the library shuffles and reads by threads of its own
        return datasets.IterableDataset.from_generator(
            lambda parts: (row for part in parts for row in part), gen_kwargs={"parts": [ROWS[:25], ROWS[25:]]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(StreamTable, "content", property(lambda self: f"{self.repository}@1 {self.settings}"))
    return asked


def table(rows: int | None = 120, buffer: int = 16, seed: int = 3, shuffle: bool = True, **entry: Any) -> StreamTable:
    return StreamTable(
        "x", DatasetEntry.model_validate({"hf_hub_url": "org/x", **entry}), StreamSettings(rows, buffer, seed, shuffle), "secret"
    )


def test_rows_come_in_order_or_shuffled(hub: list[dict[str, Any]]) -> None:
    """Pass after pass; each pass in an order of its own, the same for the same seed."""
    plain = table(shuffle=False)
    assert len(plain) == 120
    assert [plain[n] for n in range(120)] == [ROWS[n % 50] for n in range(120)]
    passes = [[t[n]["output"] for n in range(start, start + 50)] for t in (table(),) for start in (0, 50)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(row["output"] for row in ROWS)
    assert passes[0] != passes[1] != [row["output"] for row in ROWS]
    assert [table()[n]["output"] for n in (0,)] == passes[0][:1]
    again = table()
    assert [again[n]["output"] for n in range(50)] == passes[0]


def test_a_row_can_be_sought(hub: list[dict[str, Any]]) -> None:
    """As after a checkpoint: the rows before are passed over; an earlier one is read anew."""
    whole = [t[n]["output"] for t in (table(),) for n in range(50)]
    late = table()
    assert late[30]["output"] == whole[30]
    assert late[31]["output"] == whole[31]
    assert late[5]["output"] == whole[5]


@pytest.mark.parametrize("first", [49, 50, 70, 100, 119])
def test_a_row_of_a_later_pass_can_be_sought(hub: list[dict[str, Any]], first: int) -> None:
    whole = [t[n]["output"] for t in (table(),) for n in range(120)]
    late = table()
    assert [late[n]["output"] for n in range(first, 120)] == whole[first:]


def test_what_the_hub_is_asked_for(hub: list[dict[str, Any]]) -> None:
    """Subset, split, folder and token are passed on."""
    table(subset="small", split="test", folder="v2")[0]
    asked = hub[0]
    assert (asked["path"], asked["name"], asked["split"], asked["data_dir"]) == ("org/x", "small", "test", "v2")
    assert asked["streaming"] and asked["token"] == "secret"


def test_what_cannot_be_streamed(hub: list[dict[str, Any]]) -> None:
    """Each is one message that says what would do."""
    with pytest.raises(UserError, match="'streaming' needs 'max_steps'"):
        table(rows=None)
    with pytest.raises(UserError, match=r"a part of a split \('train\[:10%\]'\) cannot be streamed"):
        table(split="train[:10%]")
    with pytest.raises(UserError, match="only Hugging Face's"):
        StreamTable("x", DatasetEntry.model_validate({"ms_hub_url": "org/x"}), StreamSettings(8, 4, 0, True), None)
    with pytest.raises(UserError, match="org/gone cannot be streamed: DatasetNotFoundError"):
        table(hf_hub_url="org/gone")[0]


def test_a_run_on_a_stream(
    hub: list[dict[str, Any]], keys: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains the steps that it was asked for, encodes hardly more than it needs, and counts what it saw."""
    settings = keys(dataset="org/x", dataset_dir="ONLINE", streaming=True, buffer_size=8, max_steps=3)
    words = [f"{key}={value}" for key, value in settings.items()]
    assert main(["train", *words]) == 0
    told = capsys.readouterr().err
    assert "train: 12 samples" in told and "step 3/3" in told
    assert {one["path"] for one in hub} == {"org/x"}
    assert main(["train", *words, "max_steps=-1", "overwrite_output_dir=true"]) == 2
    assert "'streaming' of 'org/x' from a hub needs 'max_steps'" in capsys.readouterr().err
    assert main(["train", *words, "val_size=2", "overwrite_output_dir=true"]) == 2
    assert "'streaming' of 'org/x' from a hub cannot be split by 'val_size'" in capsys.readouterr().err


@pytest.mark.network
@pytest.mark.skipif("FINERY_NETWORK" not in os.environ, reason="asks a real hub")
def test_a_real_hub() -> None:
    """A small public data set, as it is."""
    one = StreamTable("x", DatasetEntry.model_validate({"hf_hub_url": "tatsu-lab/alpaca"}), StreamSettings(4, 4, 0, False), None)  # type: ignore[call-arg]
    assert one[0]["instruction"]
