"""Cases of the keys that shape the data: what each does to samples, rows and steps. `test_every_key.py` runs them."""

import json
from collections.abc import Callable
from typing import Any

import datasets
import pytest

from finery.data.encoder import CHUNK
from finery.data.streams import StreamTable
from watched import Bench, Case, Outcome, has, losses, says, steps

EPOCH = {"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 12}
"""Every sample is dealt once, so that the report knows all of them."""
IN_ORDER = EPOCH | {"disable_shuffling": True, "learning_rate": 0.0}
"""A step's loss is then that of its rows alone."""


def report(run: Outcome, data_set: str = "sums") -> dict[str, Any]:
    """What became of the samples of a data set."""
    found = json.loads((run.folder / "data_report.json").read_text())["sets"]["train"]
    assert found["complete"]
    return found["data_sets"][data_set]


def num_encoded(run: Outcome) -> int:
    """Samples that were encoded for this run, and not taken from the cache."""
    return run.trainer.train_dataset.samples.encoder.num_done()


def talks(bench: Bench) -> dict[str, Any]:
    """Keys of a set of conversations of two rounds."""
    folder = bench.tmp_path / "talks"
    folder.mkdir(exist_ok=True)
    talk = [
        {"instruction": f"And {n}?", "output": f"It is {n}.", "history": [[f"Is it {n + 1}?", f"No, {n + 1} is more."]]} for n in range(12)
    ]
    (folder / "talks.json").write_text(json.dumps(talk))
    (folder / "dataset_info.json").write_text(json.dumps({"talks": {"file_name": "talks.json", "columns": {"history": "history"}}}))
    return EPOCH | {"dataset": "talks", "dataset_dir": str(folder)}


def split_special_tokens(bench: Bench) -> None:
    (bench.tmp_path / "spelt.json").write_text(json.dumps([{"instruction": "What is <|im_end|>?", "output": f"{n}."} for n in range(12)]))
    base = EPOCH | {"dataset": "spelt", "dataset_dir": str(bench.tmp_path)}
    (bench.tmp_path / "dataset_info.json").write_text('{"spelt": {"file_name": "spelt.json"}}')
    found = [report(bench.train(**base, split_special_tokens=value), "spelt")["tokens"] for value in (None, True, False)]
    assert found[0] == found[1] > found[2], "one token for a word of ten letters"


def overwrite_cache(bench: Bench) -> None:
    bench.train(**EPOCH)
    assert num_encoded(bench.train(**EPOCH)) == 0
    assert num_encoded(bench.train(**EPOCH, overwrite_cache=True)) == 24


def preprocessing_num_workers(bench: Bench) -> None:
    records = json.loads((bench.data_dir / "sums.json").read_text()) * 6
    (bench.tmp_path / "many.json").write_text(json.dumps(records))
    (bench.tmp_path / "dataset_info.json").write_text('{"many": {"file_name": "many.json"}}')
    base = EPOCH | {"dataset": "many", "dataset_dir": str(bench.tmp_path), "overwrite_cache": True}
    alone, together = bench.train(**base), bench.train(**base, preprocessing_num_workers=2)
    shares = [list(run.trainer.train_dataset.encoder.shared.done) for run in (alone, together)]
    assert [len(share) for share in shares] == [1, 2]
    assert sum(shares[0]) == 144 <= sum(shares[1]) < 144 + CHUNK
    assert all(shares[1])
    assert losses(alone) == losses(together)


def truncation(bench: Bench) -> None:
    """Rows have 50 to 69 tokens, answers less than half of them, and stand at their end."""
    found = {}
    for how in ("proportional", "drop", "keep_start", "keep_end", "split"):
        line = report(bench.once(**EPOCH, cutoff_len=60, truncation=how))
        assert line["tokens"] + line["cut_tokens"] == 1454, "every token is learnt, read or counted as cut"
        lost = [name for name in ("lost_ends_of_turn", "lost_headers") if line[name]]
        found[how] = (line["used"], line["rows"] > 24, line["cut_tokens"] > 0, lost)
    fitting = found["drop"][0]
    assert 0 < fitting < 24
    assert found == {
        "proportional": (24, False, True, ["lost_ends_of_turn", "lost_headers"]),  # an answer below half the room is kept whole
        "drop": (fitting, False, True, []),
        "keep_start": (24, False, True, ["lost_ends_of_turn"]),
        "keep_end": (24, False, True, ["lost_headers"]),
        "split": (24, True, True, ["lost_ends_of_turn", "lost_headers"]),  # a part that holds nothing of the answer is cut away
    }
    complaint = bench.once(**EPOCH, cutoff_len=60, truncation="error").complaint
    assert "sums.json row" in complaint
    assert "tokens, more than cutoff_len 60, and 'truncation: error' asks to stop" in complaint


def train_on_prompt(bench: Bench) -> None:
    plain, all_of_it = bench.once(**EPOCH), bench.once(**EPOCH, train_on_prompt=True)
    counts = [report(run)["supervised_tokens"] for run in (plain, all_of_it)]
    assert counts[0] < counts[1] == 1454 - 24 - 24  # the first token of a row is never predicted, what follows the answer is not learnt
    assert losses(plain) != losses(all_of_it)


def mask_history(bench: Bench) -> None:
    base = talks(bench)
    both, last = (report(bench.train(**base, mask_history=masked), "talks") for masked in (False, True))
    assert both["tokens"] == last["tokens"]
    assert 2 * last["supervised_tokens"] < both["supervised_tokens"]


def preserve_thinking(bench: Bench) -> None:
    """Where the answers before the last are not learnt, none of them gets a thought unless thoughts are kept."""
    base = talks(bench) | {"template": "qwen3", "mask_history": True}
    dropped, kept = (report(bench.train(**base, preserve_thinking=value), "talks") for value in (False, True))
    assert kept["tokens"] > dropped["tokens"]


def mix_strategy(bench: Bench) -> None:
    """24 and 6 samples; where they take turns, the first step holds both."""
    base = IN_ORDER | {"dataset": "sums, names"}
    sizes = {"concat": 30, "interleave_under": 12, "interleave_over": 48, "interleave_once": 30}
    runs = {name: bench.once(**base, mix_strategy=name) for name in sizes}
    assert {name: len(run.trainer.train_dataset) for name, run in runs.items()} == sizes
    assert losses(runs["concat"])[0] == losses(bench.once(**IN_ORDER))[0]
    assert len({losses(run)[0] for run in runs.values()}) == 2


def interleave_probs(bench: Bench) -> None:
    base = EPOCH | {"dataset": "sums, names", "mix_strategy": "interleave_over"}
    shares = []
    for weights in ([0.5, 0.5], "0.9, 0.1"):
        run = bench.train(**base, interleave_probs=weights)
        shares.append(report(run, "sums")["samples"] / len(run.trainer.train_dataset))
    assert 0.3 < shares[0] < 0.7
    assert 0.75 < shares[1] < 1


def eval_on_each_dataset(bench: Bench) -> None:
    base = {"eval_dataset": "sums, names"}
    both, each = (bench.once(**base, eval_on_each_dataset=apart) for apart in (False, True))
    names = [
        {name for name in json.loads((run.folder / "eval_results.json").read_text()) if name.endswith("_loss")} for run in (both, each)
    ]
    assert names == [{"eval_loss"}, {"eval_sums_loss", "eval_names_loss"}]


def packing(bench: Bench) -> None:
    """Two or three rows fill a pack, of which a step counts as many as it counted rows before."""
    alone, packed = bench.once(**IN_ORDER), bench.once(**IN_ORDER, packing=True)
    assert len(alone.trainer.train_dataset) == 24
    assert 10 <= len(packed.trainer.train_dataset) <= 12
    assert (steps(alone), steps(packed)) == (2, 1)
    assert "packs of 128 tokens" in packed.said
    assert losses(packed)[0] == pytest.approx(evaluated(bench), rel=2e-6)


def neat_packing(bench: Bench) -> None:
    assert steps(bench.once(**IN_ORDER)) == 2
    assert losses(bench.once(**IN_ORDER, neat_packing=True)) == losses(bench.once(**IN_ORDER, packing=True))


def packing_contaminated(bench: Bench) -> None:
    """The same packs, in which rows see those before them."""
    isolated, joined = bench.once(**IN_ORDER, packing=True), bench.once(**IN_ORDER, packing_contaminated=True)
    assert steps(isolated) == steps(joined)
    assert losses(isolated)[0] != pytest.approx(losses(joined)[0], rel=2e-6)


def evaluated(bench: Bench) -> float:
    """The loss of all rows of `sums` before any training, each alone."""
    run = bench.once(do_train=False, do_eval=True, dataset=None, eval_dataset="sums")
    return json.loads((run.folder / "eval_results.json").read_text())["eval_loss"]


def tokenized_path(bench: Bench) -> None:
    folder = bench.tmp_path / "tokens"
    first = bench.train(do_train=False, tokenized_path=str(folder))
    assert first.trainer is None, "nothing but the data is made"
    assert list(folder.rglob("index.bin"))
    taken = bench.train(tokenized_path=str(folder))
    assert num_encoded(taken) == 0
    assert losses(taken) == losses(bench.once())
    assert "cutoff_len was 128, is 64" in bench.train(tokenized_path=str(folder), cutoff_len=64).complaint


def train_sampling_strategy(bench: Bench) -> None:
    base = EPOCH | {"per_device_train_batch_size": 4, "learning_rate": 0.0}
    found = {name: bench.once(**base, train_sampling_strategy=name) for name in ("random", "sequential", "group_by_length")}
    assert losses(found["sequential"]) == losses(bench.once(**base, disable_shuffling=True)) != losses(found["random"])
    trainer = found["group_by_length"].trainer
    lengths = [[len(row.ids) for unit in step for row in trainer.train_dataset[unit]] for step in trainer._sampler]
    assert [max(step) for step in lengths] == sorted(map(max, lengths), reverse=True)
    assert max(max(step) - min(step) for step in lengths) < 69 - 50


def streams(bench: Bench) -> dict[str, Any]:
    """Keys of a data set on a hub that `datasets` streams: the records of `sums`."""
    records = json.loads((bench.data_dir / "sums.json").read_text())
    bench.patch.setattr(datasets, "load_dataset", lambda *place, **how: datasets.IterableDataset.from_generator(lambda: iter(records)))
    bench.patch.setattr(StreamTable, "content", property(lambda self: f"sums {self.settings}"))
    return {"dataset": "x", "dataset_dir": {"x": {"hf_hub_url": "org/sums"}}}


def streaming(bench: Bench) -> None:
    base = streams(bench)
    assert "'dataset'" not in (complaint := bench.train(**base).complaint) and complaint, "there is no hub to fetch from"
    streamed = bench.train(**base, streaming=True, disable_shuffling=True)
    assert streamed.trainer.train_dataset.samples.sources[0].sequential
    assert losses(streamed) == losses(bench.once(disable_shuffling=True))
    assert "needs 'max_steps'" in bench.train(**base, streaming=True, max_steps=None).complaint


def buffer_size(bench: Bench) -> None:
    """Among one there is nothing to shuffle."""
    base = streams(bench)
    shuffled, alone = bench.train(**base, streaming=True), bench.train(**base, streaming=True, buffer_size=1)
    assert losses(shuffled) != losses(alone) == losses(bench.once(disable_shuffling=True))


TRAINED: dict[str, Case] = {
    "dataset": Case("names", says("train: 6 samples"), (False, True)),
    "eval_dataset": Case("names", has("eval_results.json"), (False, True)),
    "cutoff_len": Case(60, says("samples cut; "), (False, True), EPOCH),
    "max_samples": Case(5, says("train: 5 samples"), (False, True)),
    "val_size": Case(4, has("eval_results.json"), (False, True)),
    "placeholders": Case({"name": "Ada"}, says("still say {{name}}"), (True, False), {"dataset": "names"}),
    "disable_shuffling": Case(True, losses),
}
OTHERS: dict[str, Callable[[Bench], None]] = {
    case.__name__: case
    for case in (
        overwrite_cache, preprocessing_num_workers, truncation, train_on_prompt, mask_history, preserve_thinking, split_special_tokens,
        mix_strategy,
        interleave_probs, eval_on_each_dataset, packing, neat_packing, packing_contaminated, tokenized_path, train_sampling_strategy,
        streaming, buffer_size,
    )
}  # fmt: skip
