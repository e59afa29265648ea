"""Cases of the keys of predictions, and of accuracy. `test_every_key.py` runs them."""

import json
from collections.abc import Callable

from watched import Bench, Case, Outcome, has, says

ANSWERS = {
    "do_train": False,
    "do_predict": True,
    "predict_with_generate": True,
    "eval_dataset": "names",
    "max_samples": 2,
    "do_sample": False,
    "max_new_tokens": 6,
}
"""The base model answers two prompts."""


def accuracies(run: Outcome) -> bool:
    return "eval_accuracy" in json.loads((run.folder / "eval_results.json").read_text())


def predicted(run: Outcome) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run.folder / "generated_predictions.jsonl").read_text().splitlines()]


TRAINED: dict[str, Case] = {
    "compute_accuracy": Case(True, accuracies, (False, True), {"val_size": 4}),
    "generation_num_beams": Case(4, says("found 4"), (False, True)),
    "eval_num_beams": Case(2, says("found 2"), (False, True)),
}


def do_predict(bench: Bench) -> None:
    alone = {"do_train": False, "do_eval": True, "val_size": 4}
    assert not has("predict_results.json")(bench.train(**alone))
    run = bench.train(**alone, do_predict=True)
    (loss,) = (json.loads((run.folder / f"{split}_results.json").read_text())[f"{split}_loss"] for split in ("predict",))
    assert loss == json.loads((run.folder / "eval_results.json").read_text())["eval_loss"]


def predict_with_generate(bench: Bench) -> None:
    assert not has("generated_predictions.jsonl")(bench.train(**ANSWERS | {"predict_with_generate": False}))
    assert len(predicted(bench.once(**ANSWERS))) == 2


def predict_metric(bench: Bench) -> None:
    bench.patch.chdir(bench.tmp_path)
    (bench.tmp_path / "my_metric_of_keys.py").write_text("def length(answers, labels):\n    return {'own': len(answers) + len(labels)}\n")
    run = bench.train(**ANSWERS, predict_metric="my_metric_of_keys:length")
    assert json.loads((run.folder / "predict_results.json").read_text())["predict_own"] == 4.0
    assert "own" not in (bench.once(**ANSWERS).folder / "predict_results.json").read_text()


def generation_max_length(bench: Bench) -> None:
    long, short = (predicted(bench.train(**ANSWERS | more)) for more in ({}, {"generation_max_length": 12}))
    assert all(a["prompt"].endswith(b["prompt"]) and a["prompt"] != b["prompt"] for a, b in zip(long, short, strict=True))


OTHERS: dict[str, Callable[[Bench], None]] = {
    case.__name__: case for case in (do_predict, predict_with_generate, predict_metric, generation_max_length)
}
