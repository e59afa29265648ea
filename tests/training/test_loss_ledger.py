"""The ledger of losses: it changes no number, loses and doubles no line, and finds what is planted."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finery.cli import main
from finery.data.rows.base import IGNORED, Row, lay, pad
from finery.methods.base import next_token_loss
from finery.methods.functions.token_losses import dft, eaft, smoothed
from finery.models.head import TokenLoss, heard, teach
from finery.models.kernels import KERNELS
from finery.models.kernels.functions import head_loss
from finery.models.load import load_model
from finery.training.choices import Choices
from finery.training.fast import make_fast
from finery.training.loss_ledger import FOLDER, Cost, Course, Ledger, costs_of, last_losses, read_ledger
from watched import Bench, Outcome, losses

Keys = Callable[..., dict[str, Any]]
LEDGER = {"loss_ledger": True, "max_steps": 6}
SAVES = LEDGER | {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def bench(keys: Keys, data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_ledger(folder / FOLDER).to_pylist()


# ------------------------------------------------------------------ what each token costs


def drawn_rows() -> list[Row]:
    dice = np.random.default_rng(0)
    rows = [Row(ids := dice.integers(1, 300, n).astype(np.int32), np.where(dice.random(n) < 0.6, ids, IGNORED)) for n in (30, 7, 2, 18)]
    silent = Row(rows[1].ids, np.full(7, IGNORED, np.int32))
    return [Row(row.ids, row.labels, None, (place,)) for place, row in enumerate([rows[0], silent, *rows[1:]])]


LOSSES: dict[str, TokenLoss | None] = {"plain": None, "dft": dft, "eaft": eaft(1.5), "smoothed": smoothed(0.2)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", ["own logits", "chunks", "chunks in C"])
def test_rows_cost_what_they_cost_alone(loss: str, way: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded or end to end, heard or not, with the same bits of the loss and of its gradient."""
    model, token_loss = load_model(tiny_model, torch.float32, False).train(), LOSSES[loss]
    if way != "own logits":
        monkeypatch.setattr(head_loss, "CHUNK_BYTES", 16 * 4 * 364)  # several chunks
        make_fast(model, {part: KERNELS[part].Options() for part in KERNELS.names()}, Choices({}), None)
        if way == "chunks":
            monkeypatch.setattr(head_loss.native, "serves", lambda tensor: False)
    teach(model)
    rows = drawn_rows()

    def measured(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        total = next_token_loss(model, batch, token_loss).total
        total.backward()
        return total.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alone = [float(measured(pad([row]))[0]) for row in rows]
    for batch in (pad(rows), lay(rows)) if way != "own logits" else (pad(rows),):
        unheard = measured(batch)
        with heard() as costs:
            total, gradient = measured(batch)
        assert torch.equal(total, unheard[0]) and torch.equal(gradient, unheard[1])
        found = costs_of(rows, [(rows, costs)])
        assert [cost.places for cost in found] == [(0,), (2,), (3,), (4,)]
        assert [cost.tokens for cost in found] == [row.num_supervised for row in rows if row.num_supervised]
        assert [cost.total for cost in found] == pytest.approx([alone[place] for place in (0, 2, 3, 4)], rel=1e-4)
        assert sum(cost.total for cost in found) == pytest.approx(float(total), rel=1e-6)


def test_a_row_that_is_heard_again_counts_once() -> None:
    """Memory was used up: what the first try came to is left out, in whatever parts it came; rows of nobody are, too."""
    rows, stranger = drawn_rows(), Row(np.zeros(3, np.int32), np.zeros(3, np.int32))
    first = [(rows[:3], [torch.full((rows[0].num_supervised + rows[2].num_supervised,), 9.0)])]
    again = [([row], [torch.ones(row.num_supervised)]) for row in reversed([*rows, stranger])]
    found = costs_of(rows, [*first, *again])
    assert [(cost.places, cost.mean) for cost in found] == [((place,), 1.0) for place in (0, 2, 3, 4)]


@pytest.mark.parametrize("costs", [[], [torch.zeros(0)]], ids=["nothing", "an empty piece"])
def test_a_step_without_supervised_tokens(costs: list[Tensor]) -> None:
    silent = drawn_rows()[1]
    assert costs_of([silent], [([silent], costs)]) == []
    assert costs_of([], []) == []


def test_rows_that_see_each_other_are_told_apart() -> None:
    """Positions that begin anew show where samples begin; a block of one long text is told of all that are in it."""
    ids, positions = np.arange(7, dtype=np.int32), np.asarray([0, 1, 2, 0, 1, 2, 3], np.int32)
    labels = np.asarray([0, 1, IGNORED, 3, 4, 5, IGNORED], np.int32)
    seen, block = Row(ids, labels, positions, (5, 5)), Row(ids, labels, None, (5, 8))
    cost = torch.tensor([1.0, 2.0, 3.0, 4.0])  # of the tokens 1, 3, 4 and 5: nothing predicts the first
    found = costs_of([seen, block], [([seen, block], [cost, cost * 10])])
    assert found == [Cost((5,), 1.0, 1), Cost((5,), 9.0, 3), Cost((5, 8), 100.0, 4)]


# ------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"micro_batches_at_once": 2, "token_budget": 100},
        {"gradient_checkpointing": True},
        {"packed_attention": False, "head_loss": False},
        {"use_asft_loss": True},
        {"neftune_noise_alpha": 5.0, "lora_dropout": 0.3},
        {"packing": True, "per_device_train_batch_size": 1},
        {"packing_contaminated": True, "per_device_train_batch_size": 1},
        {"stage": "pt", "per_device_train_batch_size": 1},
    ],
    ids=str,
)
def test_a_run_is_the_same_with_it(way: dict[str, Any], bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit; and the ledger's lines of a step make its loss."""
    monkeypatch.setattr("finery.training.lanes.FEWEST_TOKENS", 1)
    base = {**way, "max_steps": 6, "val_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    plain, noted = bench.train(**base), bench.train(**base, loss_ledger=True)
    assert not noted.complaint
    assert losses(noted) == losses(plain) and noted.column("eval_loss") == plain.column("eval_loss")
    assert all(torch.equal(weight, noted.weights()[name]) for name, weight in plain.weights().items())
    found = lines(noted.folder)
    for step, loss in enumerate(losses(noted), 1):
        here = [line for line in found if line["step"] == step]
        weights = [line["tokens"] / line["sharers"] for line in here]
        assert sum(w * line["loss"] for w, line in zip(weights, here, strict=True)) / sum(weights) == pytest.approx(loss, abs=2e-4)
    assert {line["dataset"] for line in found} == {"sums"} and all(line["file"].endswith("sums.json") for line in found)
    assert {line["sharers"] > 1 for line in found} == ({False} if way.get("stage") != "pt" else {True})


def test_every_row_once_in_an_epoch(bench: Bench) -> None:
    found = lines(bench.train(loss_ledger=True, max_steps=None, num_train_epochs=2).folder)
    for first in (1, 7):
        assert sorted(line["row"] for line in found if first <= line["step"] < first + 6) == list(range(24))


def test_memory_that_is_used_up_doubles_no_line(bench: Bench) -> None:
    from finery.training import trainer as module

    backward, calls = module.Lanes.backward, []

    def scarce(self: Any, total: Tensor) -> bool:
        calls.append(total)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory is left")
        return backward(self, total)

    bench.patch.setattr(module.Lanes, "backward", scarce)
    run = bench.train(loss_ledger=True, token_budget=128, micro_batches_at_once=1, max_steps=2)
    assert "the step is done again" in run.said
    found = lines(run.folder)
    assert len(found) == 8 == len({(line["step"], line["row"]) for line in found})


# ------------------------------------------------------------------ the files


@pytest.mark.parametrize("part", [1, 10, 4096])
def test_a_run_that_is_cut_off_and_resumed(part: int, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in any step: the ledger is that of a run that nothing disturbed."""
    monkeypatch.setattr("finery.training.loss_ledger.ROWS_A_PART", part)
    whole = bench.train(**SAVES)
    wanted = lines(whole.folder)
    assert len(wanted) == 24
    killed = bench.tmp_path / "killed"

    class Killed(BaseException):
        pass

    def kill(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("finery.training.callbacks.log_file.LogFile.on_step_end", kill, raising=False)
        patch.setattr("finery.training.callbacks.loss_ledger.LossLedger.close", lambda self: None)  # nobody has the time
        with pytest.raises(Killed):
            bench.train(**SAVES, output_dir=str(killed))
    assert [line for line in lines(killed) if line["step"] <= 4] == wanted[:16]
    resumed = bench.train(**SAVES, output_dir=str(killed), resume_from_checkpoint=str(killed / "checkpoint-4"))
    assert not resumed.complaint
    assert lines(killed) == wanted
    earlier = bench.train(**SAVES, output_dir=str(killed), resume_from_checkpoint=str(killed / "checkpoint-2"))
    assert not earlier.complaint and lines(killed) == wanted


def test_a_run_that_fails_leaves_its_steps(bench: Bench) -> None:
    def fail(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("a fault of something else")

    bench.patch.setattr("finery.training.callbacks.plot_loss.PlotLoss.on_step_begin", fail, raising=False)
    folder = bench.tmp_path / "failed"
    with pytest.raises(RuntimeError, match="something else"):
        bench.train(**LEDGER, plot_loss=True, output_dir=str(folder))
    assert {line["step"] for line in lines(folder)} == {1, 2, 3}


def test_a_stage_whose_losses_are_of_no_token(bench: Bench) -> None:
    bench.patch.setattr("finery.methods.sft.SFT.learns_tokens", False)
    assert "'loss_ledger' notes the losses of tokens, and 'stage: sft' has others" in bench.train(**LEDGER).complaint


class Samples:
    """A set of one file; the sample at a place is the row of that number."""

    class part:
        locate = staticmethod(lambda places: (np.zeros(len(places), np.int64), places))

    class source:
        name = "sums"
        file_row = staticmethod(lambda record: (Path("sums.json"), record))

    sources = [source]


def test_processes_have_parts_of_their_own(tmp_path: Path) -> None:
    """A run that goes on with fewer processes takes out what others had written, too."""
    ledgers = [Ledger(tmp_path, Samples(), rank) for rank in range(2)]  # type: ignore[arg-type]
    for step in range(1, 5):
        for rank, ledger in enumerate(ledgers):
            ledger.add(step, [Cost((2 * step + rank,), 3.0, 2)])
            if step == 2:
                ledger.flush()
    for ledger in ledgers:
        ledger.flush()
    assert [line["row"] for line in read_ledger(tmp_path).to_pylist()] == list(range(2, 10))
    (tmp_path / "000-000000003-000000004.new").write_bytes(b"half a part")
    ledgers[1].begin(3)
    assert read_ledger(tmp_path).num_rows == 8
    ledgers[0].begin(3)
    assert [line["row"] for line in read_ledger(tmp_path).to_pylist()] == list(range(2, 8))
    assert len(list(tmp_path.iterdir())) == 4
    ledgers[0].begin(0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("finery.training.loss_ledger.ROWS_A_PART", 1)
    ledger = Ledger(tmp_path / FOLDER, Samples())  # type: ignore[arg-type]
    (tmp_path / FOLDER).write_text("a file is in the way")
    for step in (1, 2):
        ledger.add(step, [Cost((step,), 3.0, 2)])
    assert capsys.readouterr().err.count("the loss ledger cannot be written") == 1
    with pytest.raises(OSError):
        ledger.flush()  # a checkpoint counts on it
    (tmp_path / FOLDER).unlink()
    ledger.add(3, [Cost((3,), 3.0, 2)])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


# ------------------------------------------------------------------ leaps


def test_what_stands_out_from_the_course() -> None:
    noise = np.random.default_rng(0)
    course = Course()
    usual = [course.stands_out(2 + float(x)) for x in noise.normal(0, 0.2, 300)]
    assert usual == [None] * 300
    assert course.stands_out(3.6) == pytest.approx(2, abs=0.2)
    assert course.stands_out(3.6) is None  # one warning is enough
    assert [course.stands_out(2.0) for _ in range(50)] == [None] * 50
    assert course.stands_out(float("nan")) is None
    assert course.stands_out(3.6) is not None
    falling = Course()
    assert [falling.stands_out(6 * 0.9**step + 1) for step in range(15)] == [None] * 15
    assert falling.stands_out(5.0) is not None
    young = Course()
    assert [young.stands_out(loss) for loss in (1.0, 1.0, 9.0, 1.0)] == [None] * 4


def test_a_leap_names_its_rows(bench: Bench) -> None:
    folder = bench.tmp_path / "leaping"
    folder.mkdir()
    records = [{"instruction": "Say one.", "output": "one one one one"} for _ in range(96)]
    records[81]["output"] = "Zyx 93871 qwv."
    (folder / "ones.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({"ones": {"file_name": "ones.json"}}))
    base = {"dataset": "ones", "dataset_dir": str(folder), "max_steps": 24, "learning_rate": 0.01, "disable_shuffling": True}
    base |= {"finetuning_type": "full"}
    run = bench.train(**base, loss_ledger=True)
    (warning,) = [line for line in run.said.splitlines() if "leaps" in line]
    assert warning.startswith("warning: the loss of step 21 leaps to ")
    assert "its worst rows: data set 'ones', ones.json row 81" in warning
    assert "leaps" not in bench.train(**base).said


# ------------------------------------------------------------------ finery show --worst


def worst(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["show", *words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


WRONG = (3, 11, 22, 30, 41, 58)


@pytest.fixture
def planted(bench: Bench) -> tuple[Outcome, str]:
    """A pattern that can be learnt, in which 6 of 60 answers are wrong: a run over it, and its file."""
    folder = bench.tmp_path / "planted"
    folder.mkdir()
    colours, fruits = ("red", "green", "blue"), ("apple", "pear", "plum")
    records = [{"instruction": f"Number {n}: which fruit is {colours[n % 3]}?", "output": f"The {fruits[n % 3]}."} for n in range(60)]
    for n in WRONG:
        records[n]["output"] = f"The {fruits[(n + 1) % 3]}."
    (folder / "fruits.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({"fruits": {"file_name": "fruits.json"}}))
    base = {"dataset": "fruits", "dataset_dir": str(folder), "finetuning_type": "full", "max_steps": None, "num_train_epochs": 12}
    given = base | {"loss_ledger": True, "learning_rate": 5e-3, "output_dir": str(bench.tmp_path / "noted")}
    (bench.tmp_path / "run.json").write_text(json.dumps(bench.keys(**given)))
    return bench.train(**given), str(bench.tmp_path / "run.json")


def test_planted_wrong_answers_are_found(planted: tuple[Outcome, str], capsys: pytest.CaptureFixture[str]) -> None:
    _, file = planted
    found = worst(capsys, file, "--worst", "6")
    assert {one["row"] for one in found} == set(WRONG)
    assert [one["loss"] for one in found] == sorted((one["loss"] for one in found), reverse=True)
    assert found[0]["loss"] > 3 * worst(capsys, file, "--worst", "60")[6]["loss"]
    one = next(one for one in found if one["row"] == 22)
    assert one["text"] == "user: Number 22: which fruit is green?\nassistant: The plum."
    assert one["step"] > 11 * 15 and one["dataset"] == "fruits" and one["file"].endswith("planted/fruits.json") and one["sharers"] == 1
    assert main(["show", file, "--worst", "2", "--dataset", "fruits"]) == 0
    out = capsys.readouterr().out
    assert "fruits row" in out and "assistant: The" in out


def test_what_cannot_be_shown(keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(json.dumps(keys()))
    for words, said in (
        (["--worst", "5"], "there is no loss ledger in"),
        (["--worst", "0"], "--worst should be 1 or more, found 0"),
        (["--worst", "5", "--step", "1"], "leave out --row, --num, --step and --html"),
    ):
        assert main(["show", str(tmp_path / "run.json"), *words]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps(keys(output_dir=None, do_train=None)))
    assert main(["show", str(tmp_path / "run.json"), "--worst", "5"]) == 2
    assert "reads the ledger in 'output_dir', and this run names none" in capsys.readouterr().err


def test_the_last_value_of_a_row_counts(tmp_path: Path) -> None:
    """Of all rows of its sample in that step; what is no number comes first."""
    ledger = Ledger(tmp_path, Samples())  # type: ignore[arg-type]
    ledger.add(1, [Cost((0,), 90.0, 3), Cost((1,), 4.0, 2), Cost((2, 3), float("nan"), 5)])
    ledger.add(2, [Cost((0,), 2.0, 1), Cost((0,), 12.0, 3)])
    ledger.flush()
    found = last_losses(read_ledger(tmp_path))
    missing, told = found[:2], found[2:]
    assert [list(one.values())[2:] for one in told] == [[0, 3.5, 4, 2, 1], [1, 2.0, 2, 1, 1]]
    assert {one["row"] for one in missing} == {2, 3} and all(math.isnan(one["loss"]) and one["sharers"] == 2 for one in missing)
